// A conversation as the text of a file. Pure.

import { apiMessages, chosenPath } from "./conversation.js";

const HEADINGS = { system: "System", user: "You", assistant: "Answer" };

/** The seen messages: Markdown for "md", or the JSON that `llamaclust chat` loads for "json". */
export function exportText(conversation, ending) {
  const messages = apiMessages(conversation, chosenPath(conversation).at(-1)?.id ?? null);
  if (ending === "json") return `${JSON.stringify({ messages }, null, 1)}\n`;
  return [`# ${conversation.title}`, ...messages.map(section)].join("\n\n") + "\n";
}

function section({ role, content, tool_calls: calls = [] }) {
  const called = calls.map(({ function: { name, arguments: given } }) => `\`${name}(${given})\``);
  return [`## ${HEADINGS[role]}`, ...(Array.isArray(content) ? content.map(partText) : [content]), ...called].filter(Boolean).join("\n\n");
}

function partText({ type, text, image_url: image }) {
  return type === "text" ? text : `![image](${image.url})`;
}
