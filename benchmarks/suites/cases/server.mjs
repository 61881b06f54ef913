// The server under test, and packages out of the suite's own folder (NODE_PATH is read by require alone).
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

export const api = process.env.SUITE_API;
export const model = process.env.SUITE_MODEL;
const require = createRequire(path.join(process.env.NODE_PATH, "cases.js"));

export const load = (name) => import(pathToFileURL(require.resolve(name)).href);
