"""The small model's corpus is what it says: rendered as the chat template does, right in its facts, fairly held out."""

import dataclasses
import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from glm_mlx.chat import encode_chat
from glm_mlx.small import corpus, exam, puzzles, stories, talk, words
from glm_mlx.small.corpus import Conversation, conversations, encode, segments
from glm_mlx.small.exam import Case, grade
from glm_mlx.small.turns import Style
from glm_mlx.small.vocabulary import train_vocabulary
from glm_mlx.template import GLM_TEMPLATE, ChatTemplate
from glm_mlx.tokenizer import Tokenizer

TEMPLATE = ChatTemplate(GLM_TEMPLATE)


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(seed=0)


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer(vocabulary)


def many(count, seed=0, **options):
    return list(islice(conversations(seed, **options), count))


def test_the_same_seed_gives_the_same_conversations_vocabulary_and_exams(vocabulary):
    assert many(200) == many(200)
    assert many(20, seed=1) != many(20, seed=2)
    assert train_vocabulary(0) == vocabulary
    for task in exam.EXAMS:
        assert exam.exam(task, 20, 5) == exam.exam(task, 20, 5)
        assert exam.exam(task, 20, 5) != exam.exam(task, 20, 6)


def test_every_task_occurs_and_can_be_asked_for_alone():
    assert {conversation.task for conversation in many(500)} == set(corpus.TASKS)
    for task in corpus.TASKS:
        assert {conversation.task for conversation in many(20, task=task)} == {task}


def render(conversation: Conversation, **options) -> str:
    return TEMPLATE.render(conversation.messages, tools=conversation.tools, **options)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_direct_renderer_equals_the_chat_template(held_out):
    """On 3,000 conversations, but for the role token that ends the last turn."""
    for conversation in many(1500, seed=3, held_out=held_out):
        ours = "".join(text for text, _, _ in segments(conversation))
        theirs = render(conversation, add_generation_prompt=False, clear_thinking=conversation.clear_thinking)
        last = conversation.messages[-1]
        assert ours == theirs + ("<|observation|>" if last.get("tool_calls") else "<|user|>")


def spans_by_prefixes(tokenizer, conversation):
    """Ids and weights through `encode_chat` alone: what is rendered after a generation prompt is the assistant's."""
    messages, clear = conversation.messages, conversation.clear_thinking
    ids = encode_chat(
        tokenizer,
        TEMPLATE,
        messages,
        tools=conversation.tools,
        add_generation_prompt=False,
        clear_thinking=clear,
    )
    ends = "<|observation|>" if messages[-1].get("tool_calls") else "<|user|>"
    ids.append(tokenizer.id(ends))
    weights = [corpus.READ] * len(ids)
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        kept = "reasoning_content" in message and (not clear or index > last_user)
        # Reasoning that the whole chat drops must be gone from the prefix too, though it may be newer there.
        before = [
            {key: value for key, value in older.items() if key != "reasoning_content" or not clear or at > last_user}
            for at, older in enumerate(messages[:index])
        ]
        options = {"tools": conversation.tools, "clear_thinking": False}
        prompt = encode_chat(tokenizer, TEMPLATE, before, thinking=kept, **options)
        bare = message if kept else {k: v for k, v in message.items() if k != "reasoning_content"}
        through = encode_chat(tokenizer, TEMPLATE, [*before, bare], add_generation_prompt=False, **options)
        assert ids[: len(prompt)] == prompt, "the prompt is no prefix of the chat"
        assert ids[: len(through)] == through, "the turn is no prefix of the chat"
        weights[len(prompt) : len(through) + 1] = [corpus.WRITTEN] * (len(through) + 1 - len(prompt))
    return ids, weights


@pytest.mark.parametrize("held_out", [False, True])
def test_ids_and_loss_weights_are_those_of_encode_chat(tokenizer, held_out):
    for conversation in many(150, seed=4, held_out=held_out):
        assert encode(tokenizer, TEMPLATE, conversation) == spans_by_prefixes(tokenizer, conversation)


def test_the_written_spans_decode_to_what_the_assistant_said(tokenizer):
    for conversation in many(400, seed=5):
        ids, weights = encode(tokenizer, TEMPLATE, conversation)
        written = [token for token, weight in zip(ids, weights, strict=True) if weight == corpus.WRITTEN]
        said = ""
        last_user = max(index for index, message in enumerate(conversation.messages) if message["role"] == "user")
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                if not conversation.clear_thinking or index > last_user:
                    said += message.get("reasoning_content", "") + "</think>" * ("reasoning_content" in message)
                said += message["content"]
                for call in message.get("tool_calls", []):
                    said += f"<tool_call>{call['function']['name']}"
                    for key, value in call["function"]["arguments"].items():
                        shown = value if isinstance(value, str) else json.dumps(value)
                        said += f"<arg_key>{key}</arg_key><arg_value>{shown}</arg_value>"
                    said += "</tool_call>"
                said += "<|observation|>" if message.get("tool_calls") else "<|user|>"
        assert tokenizer.decode(written, special=True) == said


def test_another_template_and_text_with_margins_are_refused(tokenizer):
    good = Conversation([{"role": "user", "content": "hi"}], None, False, "talk")
    with pytest.raises(ValueError, match="GLM_TEMPLATE"):
        encode(tokenizer, ChatTemplate("{{ messages }}"), good)
    margins = [*good.messages, {"role": "assistant", "content": " hello"}]
    with pytest.raises(ValueError, match="trim"):
        encode(tokenizer, TEMPLATE, dataclasses.replace(good, messages=margins))


def test_nearly_every_conversation_is_short_and_thinking_is_on_and_off(tokenizer):
    made = many(600, seed=6)
    lengths = [len(encode(tokenizer, TEMPLATE, conversation)[0]) for conversation in made]
    assert sum(length <= 400 for length in lengths) > 0.92 * len(made)
    assert max(lengths) < 700
    assert 0.4 < sum(conversation.thinking for conversation in made) / len(made) < 0.7
    several = [c for c in made if sum(message["role"] == "user" for message in c.messages) > 1]
    assert 0.35 < sum(c.clear_thinking for c in several) / len(several) < 0.65
    for conversation in made:
        for message in conversation.messages:
            if message["role"] == "assistant":  # an empty thought would render as none
                assert bool(message.get("reasoning_content")) == conversation.thinking


def test_digits_stay_apart_and_words_have_the_same_tokens_after_a_space(tokenizer):
    assert len(tokenizer.encode("123456")) == 6
    assert not any(re.search(r"\d.|.\d", tokenizer.token(index)) for index in range(tokenizer.vocab_size))
    assert tokenizer.vocab_size == 2048
    for word in ("Trigam", "wadrock", "braifack"):
        bare = tokenizer.encode(word)
        for before in (" ", ' "', "_", '{"'):
            together = tokenizer.encode(before + word)
            spaced = tokenizer.token(together[0])[1:] == tokenizer.token(bare[0])  # a common word with its space
            assert together[1 if spaced else -len(bare) :] == bare[1 if spaced else 0 :]


def check_column(step: str, carry: int) -> tuple[int, int]:
    """(digit written, carry) of one column of an addition, its sum recomputed."""
    found = re.fullmatch(r"(\d)\+(\d)(\+1)?=(\d+), write (\d)( carry 1)?", step)
    assert found
    assert bool(found[3]) == bool(carry)
    assert int(found[1]) + int(found[2]) + carry == int(found[4])
    assert divmod(int(found[4]), 10) == (int(bool(found[6])), int(found[5]))
    return int(found[5]), int(bool(found[6]))


def last_integer(text: str) -> int:
    return int(re.findall(r"-?\d+", text)[-1])


def test_the_working_of_additions_is_right():
    seen = 0
    for conversation in many(800, seed=7, task="addition"):
        for question, reply in zip(conversation.messages[-2::-2], conversation.messages[-1::-2], strict=False):
            asked = [int(number) for number in re.findall(r"\d+", question["content"])]
            assert last_integer(reply["content"]) == sum(asked)
            if conversation.thinking:
                head, _, rest = reply["reasoning_content"].partition(": ")
                *steps, result = rest.split("; ")
                assert sorted(map(int, head.split("+"))) == sorted(asked)
                carry, number = 0, ""
                for column, step in enumerate(steps):
                    a, b = (int(text.zfill(9)[-1 - column]) for text in head.split("+"))
                    assert step.startswith(f"{a}+{b}")
                    digit, carry = check_column(step, carry)
                    number = f"{digit}{number}"
                assert int(number) == int(result) == sum(asked)
                seen += 1
    assert seen > 400


def test_subtractions_are_right():
    for a in range(0, 130):
        for b in range(0, 130, 3):
            working = puzzles.subtract_working(a, b)
            assert last_integer(working) == a - b
            for step in re.findall(r"([\d-]+)=(\d+), write (\d)", working):
                first, *others = map(int, step[0].split("-"))
                assert first - sum(others) == int(step[1]) == int(step[2])
            digits = "".join(reversed(re.findall(r"write (\d)", working)))
            assert int(digits) == abs(a - b)


def test_sorting_and_counting_are_right():
    for conversation in many(300, seed=8, task="sorting"):
        for question, reply in zip(conversation.messages[-2::-2], conversation.messages[-1::-2], strict=False):
            answer = re.findall(r"[a-z]+", reply["content"].replace(" and ", ", "))
            assert answer == sorted(answer)
            assert set(answer) <= set(re.findall(r"[a-z]+", question["content"]))
    for conversation in many(300, seed=8, task="counting"):
        for question, reply in zip(conversation.messages[-2::-2], conversation.messages[-1::-2], strict=False):
            listed = re.search(r'"(.*)"|: (.*)', question["content"])
            assert len((listed[1] or listed[2]).split()) == last_integer(reply["content"])


# A question, and where in a story its answer stands: a second reading, apart from the code that made the story.
PAST = {"find": "found", "see": "saw", "lose": "lost", "buy": "bought", "make": "made", "hide": "hid", "have": "had"}
PAST |= {"give": "gave", "bring": "brought", "show": "showed", "sell": "sold"}
READINGS = [
    (r"(?:Which|What) colou?r (?:was|were) the (\w+)\?", r"(\w+) {0}\b"),
    (r"How many (\w+) ", r"(\w+) \w+ {0}\b"),
    (r"What did (\w+) (find|see|lose|buy|make|hide)\?", r"{0} {1} \w+ \w+ (\w+)"),
    (r"What did (\w+) have\?", r"{0}(?: the \w+)?(?:, who| came along with)?(?: had)? (?:an?|\w+) \w+ (\w+)\."),
    (r"Who (found|saw|lost|bought|made|hid) the ", r"(\w+) {0} (?!the)"),
    (
        r"Where did (\w+) (find|see|lose|buy|make|hide)",
        r"(?:{0} {1} \w+ \w+ \w+ [\w ]*?(\w+)\.|(?<!One )\b(\w+), {0} {1})",
    ),
    (r"Where did (\w+) live", r"(?:{0} (?:lived|had a house) [\w ]*?(\w+)\.|(\w+) was the home of {0})"),
    (r"Who did (\w+) (give|bring|show|sell) ", r"{0} {1} the \w+ to (\w+)"),
    (r"Who (gave|brought|showed|sold) the \w+ to", r"(\w+) {0} the"),
    (r"(?:What was the|How was the|What kind of) weather", r"It was a (\w+) "),
    (
        r"(?:What (?:kind of )?animal (?:was|is)|What was|Which animal is) (\w+)\?",
        r"(?:(\w+) (?:named|called) {0}\b|{0} was an? \w+ (\w+)|{0}, an? \w+ (\w+)|{0} the (\w+))",
    ),
    (r"How (?:did|was) (\w+)", r"{0} (?:was|was very|felt) (\w+)(?:\.| and )"),
]


def test_story_answers_are_entailed_by_the_story():
    read = 0
    for case in exam.exam("story", 800, seed=9):
        story = max((message["content"] for message in case.messages), key=len)
        question = re.split(r"[.\n:] ?", case.messages[-1]["content"])[-1]
        for asked, told in READINGS:
            if found := re.match(asked, question):
                answers = re.search(told.format(*(PAST.get(group, group) for group in found.groups())), story)
                assert answers, (question, story)
                assert case.expected["word"] in answers.groups(), (question, story)
                read += 1
                break
    assert read > 550  # most kinds of question have a reading


def test_story_questions_quote_the_sentence_that_answers():
    rng = random.Random(10)
    for _ in range(500):
        story = stories.make_story(rng, held_out=False)
        assert 3 <= len(story.sentences) <= 6
        for question in story.questions:
            assert question.sentence in story.sentences
            held = set(re.findall(r"[a-z]+", question.sentence.lower()))
            assert question.word.lower() in held
            for answer in (question.short, question.full):
                said = set(re.findall(r"[a-z]+", answer.lower()))
                assert question.word.lower() in said
                assert said.isdisjoint(rival.lower() for rival in question.rivals)


def copied_strings(calls) -> list[tuple[str, str]]:
    """(kind, text) of all that a model must copy to make these calls."""
    strings = [("tool", call["name"]) for call in calls]
    for call in calls:
        for key, value in call["arguments"].items():
            strings.append(("parameter", key))
            strings.append(("value", value) if isinstance(value, str) else ("other", json.dumps(value)))
    return strings


def tool_strings(made: list[Conversation]) -> set[tuple[str, str]]:
    """(kind, text in lower case) of every tool name, parameter and string value, in schemas and calls."""
    found = set()
    for conversation in made:
        for tool in conversation.tools or []:
            found.add(("tool", tool["function"]["name"]))
            for name, schema in tool["function"]["parameters"]["properties"].items():
                found.add(("parameter", name))
                found.update(("value", option) for option in schema.get("enum", ()))
        for message in conversation.messages:
            calls = [call["function"] for call in message.get("tool_calls", [])]
            found.update(pair for pair in copied_strings(calls) if pair[0] != "other")
    return {(kind, text.lower()) for kind, text in found}


def test_no_name_or_value_of_an_exam_is_one_of_training():
    trained = tool_strings(many(2000, seed=11, task="tools"))
    cases = exam.exam("tools", 500, seed=11)
    examined = tool_strings([Conversation([], case.tools, False, "tools") for case in cases])
    for case in cases:
        examined |= {(kind, text.lower()) for kind, text in copied_strings(case.expected["calls"]) if kind != "other"}
    for kind in ("tool", "parameter", "value"):
        assert len({text for side, text in trained if side == kind}) > 1000
        assert len({text for side, text in examined if side == kind}) > 250
    assert trained.isdisjoint(examined)
    assert not any(words.is_held_out(text, kind) for kind, text in trained if kind != "tool")  # camelCase has its parts
    assert all(words.is_held_out(text, kind) for kind, text in examined if kind == "parameter")
    assert words.is_held_out("getWeather", "tool") == words.is_held_out("weather_get", "tool")


def test_what_an_exam_wants_copied_has_tokens_that_training_copies(tokenizer):
    """The first model's failures: of cases with a token copied fewer than 3 times in 10,000 conversations it failed
    62 %, of those with 3 to 11 times 23 %, of the others none (90 cases). 56 % of the exam's cases were of the first
    sort. 10,000 conversations hold about 2,900 of tools and 2,100 turns of copying.
    """
    copied: Counter[int] = Counter()
    for conversation in many(2900, seed=0, task="tools"):
        for message in conversation.messages:
            for _, text in copied_strings([call["function"] for call in message.get("tool_calls", [])]):
                copied.update(tokenizer.encode(text))
    rng = random.Random(0)
    for _ in range(2100):
        copied.update(tokenizer.encode(talk.copying(rng, Style(False, False, False)).messages[-1]["content"]))
    rarest = [
        min(copied[token] for _, text in copied_strings(case.expected["calls"]) for token in tokenizer.encode(text))
        for case in exam.exam("tools", 500, seed=1)
    ]
    assert sum(count < 1 for count in rarest) < 0.02 * len(rarest)
    assert sum(count < 3 for count in rarest) < 0.06 * len(rarest)
    assert sum(count < 12 for count in rarest) < 0.30 * len(rarest)


def test_reasoning_names_the_tools_alone_and_calls_follow_the_schema():
    seen = 0
    for conversation in many(300, seed=16, task="tools"):
        order = {
            tool["function"]["name"]: list(tool["function"]["parameters"]["properties"])
            for tool in conversation.tools or []
        }
        for message in conversation.messages:
            for call in message.get("tool_calls", []):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                assert list(arguments) == [key for key in order[name] if key in arguments]
                if conversation.thinking:
                    seen += 1
                    assert name in message["reasoning_content"]
                    assert "=" not in message["reasoning_content"]
    assert seen > 150


def test_copying_says_the_same_again():
    for conversation in many(300, seed=17, task="copying"):
        for question, reply in zip(conversation.messages[-2::-2], conversation.messages[-1::-2], strict=False):
            assert reply["content"] in question["content"]
            assert question["content"].rstrip('".').endswith(reply["content"])


def test_characters_of_a_story_have_two_names_and_plurals_are_right():
    rng = random.Random(18)
    firsts, friends = Counter(), Counter()
    for _ in range(1000):
        teller = stories._Teller(rng, False, {}, stories._known_name)
        assert teller.name != teller.friend
        firsts[teller.name] += 1
        friends[teller.friend] += 1
    for names in (firsts, friends):  # a likeliest name, so that greedy text has one
        assert 0.1 < names.most_common(1)[0][1] / 1000 < 0.3
    assert firsts.most_common(1)[0][0] != friends.most_common(1)[0][0]
    plurals = {"brush": "brushes", "box": "boxes", "cup": "cups", "story": "stories", "key": "keys", "mouse": "mice"}
    assert {noun: words.plural(noun) for noun in plurals} == plurals


def test_sums_of_the_exam_never_occur_in_training():
    def sums(conversation):
        for message in conversation.messages:
            numbers = re.findall(r"\d+", message["content"])
            if message["role"] == "user" and len(numbers) == 2 and min(map(len, numbers)) > 1:
                yield tuple(sorted(numbers))

    trained = {pair for conversation in many(2000, seed=12, task="addition") for pair in sums(conversation)}
    examined = {tuple(sorted(map(str, case.expected["numbers"][:2]))) for case in exam.exam("addition", 500, 12)}
    assert len(trained) > 1000
    assert trained.isdisjoint(examined)


def raw_reply(conversation: Conversation, index: int) -> str:
    """What the model would have to write for the message at `index`, with its stop token."""
    cut = Conversation(conversation.messages[: index + 1], conversation.tools, conversation.thinking, "", False)
    return "".join(text for text, _, weight in segments(cut) if weight == corpus.WRITTEN)


def graded(case: Case, raw: str, finished: bool = True) -> bool:
    body = raw.rpartition("<|")[0]
    reasoning, _, answer = body.rpartition("</think>") if case.thinking else ("", "", body)
    return grade(case, reasoning, re.sub(r"<tool_call>.*", "", answer, flags=re.DOTALL), raw, finished)


def test_every_turn_of_the_corpus_passes_the_format_exam():
    for conversation in many(400, seed=13, held_out=True):
        for index, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                case = Case(conversation.messages[:index], conversation.tools, conversation.thinking, "format", {})
                alone = Conversation([message], None, conversation.thinking, "", False)
                assert graded(case, raw_reply(alone, 0))
                assert not graded(case, raw_reply(alone, 0), finished=False)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": {key: {"type": kind} for key, kind in kinds.items()}},
        },
    }
    for name, kinds in (
        ("rent_boat", {"harbor": "string", "guest": "string", "days": "integer", "price": "number", "fast": "boolean"}),
        ("rent_bike", {"harbor": "string"}),
    )
]
ARGUMENTS = {"harbor": "Trigam", "guest": "5", "days": 5, "price": 2.5, "fast": True}


def call_text(name="rent_boat", **changes) -> str:
    """A call with some arguments changed, or left out where None; strings raw, others as given."""
    shown = {"harbor": "Trigam", "guest": "5", "days": "5", "price": "2.5", "fast": "true"} | changes
    pairs = (f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in shown.items() if value)
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


TOOL_CASE = Case([], TOOLS, False, "tools", {"calls": [{"name": "rent_boat", "arguments": ARGUMENTS}]})


@pytest.mark.parametrize(
    ("raw", "right"),
    [
        (call_text() + "<|observation|>", True),
        (call_text(price="2.50") + "<|observation|>", True),
        (call_text(harbor="5", guest="Trigam") + "<|observation|>", False),
        (call_text(days='"5"') + "<|observation|>", False),
        (call_text(guest='"5"') + "<|observation|>", False),
        (call_text(days="5.0") + "<|observation|>", False),
        (call_text(fast="1") + "<|observation|>", False),
        (call_text(fast="True") + "<|observation|>", False),
        (call_text(harbor="Trigam ") + "<|observation|>", False),
        (call_text(harbor="trigam") + "<|observation|>", False),
        (call_text(guest=None) + "<|observation|>", False),
        (call_text(boat="x") + "<|observation|>", False),
        (call_text("rent_bike") + "<|observation|>", False),
        (call_text("rent_boats") + "<|observation|>", False),
        (call_text("rent_boat\n") + "<|observation|>", False),
        ("Sure. " + call_text() + "<|observation|>", False),
        (call_text() + " done<|observation|>", False),
        (call_text() * 2 + "<|observation|>", False),
        (call_text() + "<|user|>", False),
        (call_text(), False),
        (call_text().replace("</arg_value>", "", 1) + "<|observation|>", False),
        ("I have no tool for that.<|user|>", False),
    ],
)
def test_grade_of_tool_calls_is_exact(raw, right):
    assert graded(TOOL_CASE, raw) == right


def test_grade_accepts_the_corpus_own_tool_calls():
    for conversation in many(300, seed=14, task="tools"):
        for index, message in enumerate(conversation.messages):
            if calls := message.get("tool_calls"):
                expected = {"calls": [call["function"] for call in calls]}
                case = Case([], conversation.tools, conversation.thinking, "tools", expected)
                alone = Conversation([message], None, conversation.thinking, "", False)
                assert graded(case, raw_reply(alone, 0)), (index, message)


def test_grade_of_sums_and_story_answers():
    sum_case = Case([], None, True, "addition", {"numbers": [47, 38, 85]})
    for answer in ("85", "85.", "47 + 38 = 85", "The answer is 85."):
        assert graded(sum_case, f"7+8=15</think>{answer}<|user|>")
    for answer in ("84", "185", "85 or 86", "47 + 39 = 85", "-85", "85 - 47", "eighty-five"):
        assert not graded(sum_case, f"7+8=15</think>{answer}<|user|>")
    assert not graded(sum_case, "85<|user|>")
    story_case = Case([], None, False, "story", {"word": "red", "rivals": ["blue", "green"]})
    for answer in ("Red.", "The cup was red."):
        assert graded(story_case, f"{answer}<|user|>")
    for answer in ("Blue.", "Red and blue.", "It was reddish.", "The cup.", ""):
        assert not graded(story_case, f"{answer}<|user|>")


@pytest.mark.parametrize(
    ("raw", "right"),
    [
        ("so</think>yes<|user|>", True),
        ("</think>yes<|user|>", False),
        ("so yes<|user|>", False),
        ("so</think><|user|>", False),
        ("so</think>yes</think>no<|user|>", False),
        ("so<tool_call></think>yes<|user|>", False),
        ("so</think>yes<|assistant|>", False),
        ("so</think>yes<|observation|>", False),
        ("so</think>yes", False),
    ],
)
def test_format_exam(raw, right):
    assert graded(Case([], None, True, "format", {}), raw) == right


def test_the_model_knows_who_it_is():
    answers = " ".join(answer for _, answer, _ in talk._PROJECT)
    assert "a very small model that ships with glm-mlx, to show that it works" in answers
    assert "--model OWNER/REPO:Q4_0" in answers
    assert not re.search(r"\b(ME|REAL|CAN|GREETING)\b", answers)
