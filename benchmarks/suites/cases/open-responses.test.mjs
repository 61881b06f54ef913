// Open Responses' compliance tests over HTTP, out of a checkout of openresponses/openresponses.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { cpSync } from "node:fs";
import { dirname, join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { api, checkout, model } from "./server.mjs";

// Beside the packages that they import.
const folder = join(dirname(fileURLToPath(import.meta.url)), "open-responses");
for (const part of ["bin", "src/lib", "src/generated"]) {
  cpSync(join(checkout, part), join(folder, part), { recursive: true });
}
const arguments_ = ["--base-url", `${api}/v1`, "--api-key", "none", "--model", model, "--json"];
const program = ["--import", "tsx", join(folder, "bin", "compliance-test.ts")];
const made = spawnSync(process.execPath, [...program, ...arguments_], { encoding: "utf8", cwd: folder });
const { results } = JSON.parse(made.stdout);

for (const { id, status, errors } of results) {
  const isSkipped = id.startsWith("websocket-") && "a test of WebSockets";
  test(id, { skip: isSkipped }, () => assert.equal(status, "passed", errors?.join("; ")));
}
