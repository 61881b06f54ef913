"""The beginning of an answer that the prompt already contains: open reasoning, or part of an assistant message."""

from __future__ import annotations

from llamaclust.model.chat.tools.tool_format import ChannelCalls, ToolFormat


def opened_reasoning(form: ToolFormat, prompt: str) -> str:
    """Returns the open reasoning tag at the end of the prompt, or "" if there is none."""
    tags = form.reasoning
    if tags is None or not prompt.rstrip().endswith(tags.begin):
        return ""
    return prompt[prompt.rindex(tags.begin) :]


def ended_reasoning(form: ToolFormat, prompt: str) -> str:
    tags = form.reasoning
    return f"{tags.end}\n\n" if tags is not None and opened_reasoning(form, prompt) else ""


def continuation(form: ToolFormat, prompt: str, reasoning: str, content: str, *, in_reasoning: bool) -> str:
    if isinstance(form.calls, ChannelCalls):
        return _channel_continuation(form.calls, reasoning, content, in_reasoning=in_reasoning)
    tags = form.reasoning
    if tags is None:
        return content
    opened = opened_reasoning(form, prompt)
    if in_reasoning:
        return reasoning if opened else tags.begin + reasoning
    if not reasoning:
        return (tags.end if opened else "") + content
    return ("" if opened else tags.begin) + reasoning + tags.end + content


def _channel_continuation(calls: ChannelCalls, reasoning: str, content: str, *, in_reasoning: bool) -> str:
    thoughts = calls.reasoning_header + calls.header_end + reasoning
    text = calls.content_header + calls.header_end + content
    if in_reasoning:
        return thoughts
    end = "".join(calls.message_ends[:1])
    has_thoughts = reasoning and calls.reasoning_header != calls.content_header
    return thoughts + end + calls.message_begin + text if has_thoughts else text
