"""Tests of the formats of calls and reasoning that are derived from templates."""

from __future__ import annotations

from llamaclust.model.chat.tools.known_formats import GENERIC_CALLS
from llamaclust.model.chat.tools.tool_format import Frame, NamedCalls, ObjectCalls, ReasoningTags, TaggedCalls
from support.chat.sample_templates import TEMPLATES, form_of, render_with

THINK = ReasoningTags("<think>", ("</think>",))


def test_objects_between_tags() -> None:
    form = form_of("hermes")
    assert form.calls == ObjectCalls(Frame(call_begin="<tool_call>", call_end="</tool_call>"))
    assert form.reasoning == THINK and form.takes_tools and form.takes_call_messages and form.takes_tool_role
    assert not form.takes_text_arguments and not form.calls_end_reasoning


def test_tagged_arguments() -> None:
    form = form_of("coder")
    assert form.calls == TaggedCalls(
        Frame(call_begin="<tool_call>\n<function=", call_end="</function>\n</tool_call>"),
        name_end=">",
        argument_begin="<parameter=",
        key_end=">",
        value_end="</parameter>",
        value_indent="\n",
        value_dedent="\n",
        has_python_values=True,
    )
    assert form.calls_end_reasoning


def test_tagged_keys_and_values() -> None:
    calls = form_of("glm").calls
    assert isinstance(calls, TaggedCalls)
    assert (calls.name_end, calls.argument_begin, calls.key_end) == ("", "<arg_key>", "</arg_key>\n<arg_value>")
    assert calls.value_end == "</arg_value>"


def test_list_of_objects_with_ids() -> None:
    expected = ObjectCalls(Frame("[TOOL_CALLS]"), id_key="id", is_list=True)
    assert form_of("mistral").calls == expected


def test_name_id_and_arguments_between_markers() -> None:
    assert form_of("devstral").calls == NamedCalls(Frame(call_begin="[TOOL_CALLS]"), "[ARGS]", "[CALL_ID]")


def test_arguments_that_a_template_writes_as_they_are_are_text() -> None:
    form = form_of("deepseek")
    assert form.takes_text_arguments
    assert form.calls == NamedCalls(Frame("<calls_begin>", "<call_begin>", "<call_end>", "<calls_end>"), "<sep>")


def test_objects_without_markers() -> None:
    assert form_of("llama").calls == ObjectCalls(Frame(), arguments_key="parameters")


def test_template_without_tools_gets_the_generic_form() -> None:
    form = form_of("plain")
    assert form.calls == GENERIC_CALLS
    assert not form.takes_tools and not form.takes_call_messages


def test_template_that_refuses_everything_has_the_generic_form() -> None:
    from llamaclust.model.chat.tools.format_derivation import derive_format

    source = "{{ raise_exception('no') }}"
    form = derive_format(source, render_with(source))
    assert form.calls == GENERIC_CALLS and form.reasoning is None


def test_long_runs_of_brackets_are_no_calls() -> None:
    from llamaclust.model.chat.tools.format_derivation import derive_format

    for count in (5_000, 200_000):
        call = f"{{{{ '[' * {count} }}}}{{{{ m.tool_calls[0].function.name }}}}"
        shown = f"{{% if m.tool_calls %}}{call}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
        source = f"{{% for m in messages %}}{shown}{{% endfor %}}"
        assert derive_format(source, render_with(source)).calls == GENERIC_CALLS


def test_reasoning_that_the_prompt_opens() -> None:
    from llamaclust.model.chat.tools.begun_answer import opened_reasoning
    from llamaclust.model.chat.tools.format_derivation import derive_format

    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% if enable_thinking %}<think>\n{% else %}<think></think>{% endif %}{% endif %}"
    )
    render = render_with(source)
    form = derive_format(source, render)
    assert form.reasoning == THINK
    question = [{"role": "user", "content": "<think>"}]
    assert opened_reasoning(form, render(question, True, {"enable_thinking": True})) == "<think>\n"
    assert opened_reasoning(form, render(question, True, {"enable_thinking": False})) == ""


def test_all_samples_have_a_form() -> None:
    for name in TEMPLATES:
        assert form_of(name).calls is not None, name
