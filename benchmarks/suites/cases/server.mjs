// The server under test, and the checkout that its tests come from, where they are in no package.
export const api = process.env.SUITE_API;
export const model = process.env.SUITE_MODEL;
export const checkout = process.env.SUITE_CHECKOUT;
