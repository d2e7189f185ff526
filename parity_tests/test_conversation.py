"""The turns of a chat as tokens: what a turn adds is all that the model computes."""

from collections.abc import Sequence

import pytest

from glm_mlx.conversation import Conversation
from glm_mlx.engine import Engine
from glm_mlx.load import Loaded, load_model
from glm_mlx.output import OutputSplitter
from glm_mlx.sampling import SamplingParams
from glm_mlx.small import SMALL_MODEL
from glm_mlx.template import GLM_TEMPLATE, ChatTemplate

QUESTIONS = ("What is 47 + 38?", "Hello", "And what is 8 + 9?")
# Another family's way: the answer ends with a token of its own, and the next turn does not begin with it.
WITH_AN_END = """\
{%- for m in messages -%}{{- "<|" ~ m.role ~ "|>" ~ m.content -}}
{%- if m.role == "assistant" -%}<|endoftext|>{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
COUNTS_TURNS = """\
{{- messages | length -}}{%- for m in messages -%}{{- "<|" ~ m.role ~ "|>" ~ m.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


@pytest.fixture(scope="module")
def small() -> Loaded:
    return load_model(SMALL_MODEL)


def conversation(small: Loaded, template: str = GLM_TEMPLATE, **options: bool) -> Conversation:
    return Conversation(small.tokenizer, ChatTemplate(template), "Be brief.", **options)


def say(small: Loaded, talk: Conversation, text: str, tokens: Sequence[int]) -> list[int]:
    """A turn with this answer. Returns its prompt."""
    prompt = talk.ask(text)
    splitter = OutputSplitter(small.tokenizer, starts_inside=prompt[-1] == small.tokenizer.think_open_id)
    said = {"reasoning": "", "answer": "", "tool_call": ""}
    for token in tokens:
        for part, piece in splitter.push(token) if token not in small.tokenizer.stop_ids else ():
            said[part] += piece
    talk.add(text, prompt, list(tokens), said["reasoning"], said["answer"] + said["tool_call"])
    return prompt


def encode(small: Loaded, text: str) -> list[int]:
    return small.tokenizer.encode(text, special=True)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(("temperature", "count"), [(0.0, 200), (3.0, 30)], ids=["sensible", "noise, cut short"])
def test_a_turn_computes_only_what_it_adds(small: Loaded, thinking: bool, temperature: float, count: int) -> None:
    """By the engine's own count. Noise comes back as other tokens when its text is encoded again."""
    talk, engine, before = conversation(small, thinking=thinking), Engine(small.model), 0
    for number, question in enumerate(QUESTIONS):
        prompt, params = talk.ask(question), SamplingParams(temperature=temperature, top_p=1.0, seed=number)
        answer = [step.token for step in engine.generate(prompt, params, count, small.tokenizer.stop_ids)]
        assert say(small, talk, question, answer) == prompt
        added = encode(small, f"</think><|user|>{question}<|assistant|><think>")  # the first where it was cut short
        assert engine.stats.prompt_tokens == len(prompt)
        if before:
            assert len(prompt) - engine.stats.cached_tokens <= len(added) + 1  # the last token of all is not cached
            assert engine.stats.cached_tokens >= before - 1
        before = len(prompt) + len(answer)


def test_answers_stay_the_tokens_that_they_were(small: Loaded) -> None:
    """Letter by letter, where the tokenizer would take whole words; bytes that are no text, too."""
    talk = conversation(small)
    spelt = [token for letter in "the working" for token in encode(small, letter)]
    answer = [*spelt, small.tokenizer.think_close_id, *encode(small, "\n"), *spelt, *encode(small, "\udcff")]
    assert encode(small, "the working") != spelt
    first = say(small, talk, "Hello", [*answer, *encode(small, "<|user|>")])
    assert talk.ask("Go on") == [*first, *answer, *encode(small, "<|user|>Go on<|assistant|><think>")]


def test_a_thought_that_was_cut_short_is_closed(small: Loaded) -> None:
    talk = conversation(small)
    first = say(small, talk, "Hello", encode(small, "hm"))
    following = [*first, *encode(small, "hm</think><|user|>Go on<|assistant|><think>")]
    assert talk.ask("Go on") == following


def test_a_call_of_a_tool_stays_in_the_history(small: Loaded) -> None:
    """It stays the tokens that it was; where old turns are read again, as its text."""
    call = "I look.<tool_call>look<arg_key>at</arg_key><arg_value>a b</arg_value></tool_call>"
    for keep in (True, False):
        talk = conversation(small, keep_reasoning=keep)
        say(small, talk, "Hello", encode(small, f"hm</think>{call}<|observation|>"))
        prompt = talk.ask("Go on")
        assert f"</think>{call}<|user|>Go on" in small.tokenizer.decode(prompt, special=True)
        assert (small.tokenizer.call_open_id in prompt) == keep


@pytest.mark.parametrize("template", [GLM_TEMPLATE, GLM_TEMPLATE.replace("clear_thinking is false", "true")])
def test_reasoning_is_dropped_if_asked(small: Loaded, template: str) -> None:
    """Also by a template that would always show it."""
    talk = conversation(small, template, keep_reasoning=False)
    say(small, talk, "Hello", encode(small, "a thought</think>an answer<|user|>"))
    assert talk.ask("Go on") == encode(
        small,
        "[gMASK]<sop><|system|>Be brief.<|user|>Hello<|assistant|></think>an answer<|user|>Go on<|assistant|><think>",
    )


@pytest.mark.parametrize("stopped", [True, False])
def test_an_end_that_the_template_wants_is_there_once(small: Loaded, stopped: bool) -> None:
    """Whether the model wrote it or was stopped before."""
    talk = conversation(small, WITH_AN_END)
    say(small, talk, "Hello", encode(small, "fine" + "<|endoftext|>" * stopped))
    assert talk.ask("Go on") == encode(
        small, "<|system|>Be brief.<|user|>Hello<|assistant|>fine<|endoftext|><|user|>Go on<|assistant|>"
    )


def test_a_template_that_renders_old_turns_anew_is_followed(small: Loaded) -> None:
    talk = conversation(small, COUNTS_TURNS)
    say(small, talk, "Hello", encode(small, "fine<|user|>"))
    whole = "<|system|>Be brief.<|user|>Hello<|assistant|>fine<|user|>Go on<|assistant|>"
    assert talk.ask("Go on") == encode(small, "4" + whole)


def test_reset_leaves_the_system_message(small: Loaded) -> None:
    talk = conversation(small)
    first = say(small, talk, "Hello", encode(small, "fine<|user|>"))
    assert talk.ask("Hello") != first
    talk.reset()
    assert talk.ask("Hello") == first
