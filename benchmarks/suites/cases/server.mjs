// The server under test.
export const api = process.env.SUITE_API;
export const model = process.env.SUITE_MODEL;
