"""Tools, requests for them, calls in GLM's format, results, and answers made from the results.

A tool is a random compound of everyday and invented words. A request names a parameter ("with city Paris"), or says its
role as its description does ("in Paris" for "the place"). A call holds exactly the arguments that the request gives.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm_mlx.small.puzzles import addition
from glm_mlx.small.talk import out_of_scope, small_talk
from glm_mlx.small.turns import Message, Style, Turn, assistant, user
from glm_mlx.small.words import (
    CITIES,
    NOUNS,
    PARAMETERS,
    VERBS,
    any_word,
    capital,
    invented,
    is_held_out,
    joined,
    listed,
    on_side,
    person,
    say,
    with_article,
)

Value = str | int | float | bool

_MAX_SCHEMA_CHARS = 950  # with OpenAI's wrapping; keeps a conversation near 400 tokens


@dataclass(frozen=True)
class Role:
    """What a parameter is for: how its schema describes it and how a request says it without its name."""

    description: str
    kind: str  # JSON schema's type
    phrase: str  # with {} for the value; two, separated by a bar, for true and false
    value: Callable[[random.Random], Value]
    options: tuple[str, ...] = ()  # the schema's "enum", where there is one


@dataclass(frozen=True)
class Parameter:
    name: str
    role: Role
    description: str
    required: bool


@dataclass(frozen=True)
class Tool:
    name: str
    description: str  # "Get the weather."
    task: str  # "get the weather": how a request says it
    noun: str
    parameters: tuple[Parameter, ...]

    def schema(self) -> dict[str, Any]:
        """OpenAI's form."""
        properties = {}
        for parameter in self.parameters:
            schema: dict[str, Any] = {"type": parameter.role.kind}
            if parameter.description:
                schema["description"] = parameter.description
            if parameter.role.options:
                schema["enum"] = list(parameter.role.options)
            properties[parameter.name] = schema
        required = [parameter.name for parameter in self.parameters if parameter.required]
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    tool: Tool
    arguments: dict[str, Value]  # in the schema's order
    request: str  # "get the weather in Paris", without a full stop


def _place(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(CITIES)
    name = rng.choice(CITIES) if rng.random() < 0.3 else invented(rng).capitalize()
    return name if kind < 0.75 else f"{name} {rng.choice(NOUNS).capitalize()}"


def _words(rng: random.Random) -> str:
    return " ".join(any_word(rng) for _ in range(rng.choice((1, 2, 2, 3))))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((1, 2, 2, 3))))


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.choice((2, 3, 4, 4, 5, 6))))


def _code(rng: random.Random) -> str:
    """`WR-2517`, `QA04`, `0914-77`, `3B81K`"""
    kind = rng.random()
    if kind < 0.7:
        return f"{_letters(rng)}{rng.choice(('-', ''))}{_digits(rng)}"
    if kind < 0.85:
        return f"{_digits(rng)}-{_digits(rng)}"
    return f"{_digits(rng)}{_letters(rng)}{rng.choice(('', _digits(rng)))}"


def _date(rng: random.Random) -> str:
    return f"20{rng.randrange(24, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


def _clock(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def _small_integer(rng: random.Random) -> int:
    return rng.randrange(2, 31)


def _integer(rng: random.Random) -> int:
    return rng.randrange(2, 10 ** rng.choice((1, 2, 2, 3, 4, 5, 6)))


def _level(rng: random.Random) -> int:
    number = _integer(rng)
    return -number if rng.random() < 0.15 else number


def _number(rng: random.Random) -> float:
    whole = rng.randrange(10 ** rng.choice((1, 2, 2, 3)))
    return (
        whole if rng.random() < 0.15 else float(f"{whole}.{rng.choice((rng.randrange(1, 10), rng.randrange(10, 100)))}")
    )


def _flag(rng: random.Random) -> bool:
    return rng.random() < 0.5


# Verbs that ask for something, so that "What is the weather in Paris?" asks for it too.
_GETTERS = {"get", "find", "fetch", "check", "show", "read", "search", "track", "list", "report"}

_ROLES = (
    Role("The place", "string", "in {}", _place),
    Role("The person", "string", "for {}", person),
    Role("The date", "string", "on {}", _date),
    Role("The time", "string", "at {}", _clock),
    Role("The topic", "string", "about {}", _words),
    Role("The text", "string", "saying {}", _words),
    Role("The code", "string", "with code {}", _code),
    Role("The place to start from", "string", "from {}", _place),
    Role("The place to go to", "string", "to {}", _place),
    Role("How many times", "integer", "{} times", _integer),
    Role("How many days", "integer", "for {} days", _small_integer),
    Role("How many people", "integer", "for {} people", _small_integer),
    Role("The level", "integer", "at level {}", _level),
    Role("The highest price", "number", "under {} coins", _number),
    Role("The weight in kilograms", "number", "weighing {} kilograms", _number),
    Role("The length in meters", "number", "of {} meters", _number),
    Role("Whether it is urgent", "boolean", "urgently|without hurry", _flag),
    Role("Whether it is secret", "boolean", "in secret|in public", _flag),
    Role("Whether to do it again", "boolean", "again and again|only once", _flag),
)


def _held(rng: random.Random, held_out: bool, make: Callable[[random.Random], Value]) -> Value:
    """A value on the wanted side of the split; only strings have sides."""
    while isinstance(value := make(rng), str) and is_held_out(value, "value") != held_out:
        pass
    return value


def _choice_role(rng: random.Random, held_out: bool) -> Role:
    """A parameter with two or three values to choose from."""
    options = tuple({on_side(rng, held_out, "value", any_word): None for _ in range(rng.choice((2, 3)))})
    return Role("The kind", "string", "as {}", lambda rng: rng.choice(options), options)


def _parameter_name(rng: random.Random) -> str:
    """`city`, `city_name`, and with invented words"""
    name, other = any_word(rng, PARAMETERS), any_word(rng, PARAMETERS)
    return name if rng.random() < 0.65 or name == other else f"{name}_{other}"


def _parameters(rng: random.Random, held_out: bool, count: int) -> tuple[Parameter, ...]:
    described = rng.random() < 0.75
    # In one request "for" may mean a person, days or people, told apart by the value; no role occurs twice.
    roles = rng.sample(_ROLES, count)
    if roles and rng.random() < 0.1:
        roles[0] = _choice_role(rng, held_out)
    made: dict[str, Parameter] = {}
    for role in roles:
        name = ""
        while not name or name in made:
            name = on_side(rng, held_out, "parameter", _parameter_name)
        description = say(rng, f"({role.description}.|{role.description}|{role.description}.)") if described else ""
        made[name] = Parameter(name, role, description, required=rng.random() < 0.7)
    return tuple(made.values())


def _tool_name(rng: random.Random) -> tuple[str, str, str]:
    """The name, and the verb and noun of its task: `get_weather`, `get`, `weather`."""
    verb, noun = any_word(rng, VERBS), any_word(rng, NOUNS)
    noun_words = noun if rng.random() < 0.75 else f"{any_word(rng, NOUNS)} {noun}"
    snake_noun = noun_words.replace(" ", "_")
    shape = rng.random()
    if shape < 0.7:
        name = f"{verb}_{snake_noun}"
    elif shape < 0.8:
        name = f"{snake_noun}_{verb}"
    elif shape < 0.9:
        name = verb + "".join(word.capitalize() for word in noun_words.split())
    else:  # a name that says nothing: the description must do
        name = any_word(rng, NOUNS) + "_" + invented(rng)
    return name, verb, noun_words


def _tool(rng: random.Random, held_out: bool, count: int) -> Tool:
    name, verb, noun_words = _tool_name(rng)
    while is_held_out(name, "tool") != held_out:
        name, verb, noun_words = _tool_name(rng)
    article = rng.choice(("the", "the", "a"))
    task = f"{verb} {with_article(noun_words) if article == 'a' else 'the ' + noun_words}"
    description = capital(
        say(rng, f"({task}.|{task}.|{task}|use this to {task}.|{task} for the user.|a tool to {task}.)")
    )
    return Tool(name, description, task, noun_words, _parameters(rng, held_out, count))


def make_tools(rng: random.Random, held_out: bool) -> list[Tool]:
    """One to four tools with no noun in common, at most six parameters in all."""
    tools: list[Tool] = []
    words: set[str] = set()
    room = 6
    for _ in range(rng.choices((1, 2, 3, 4), (38, 34, 18, 10))[0]):
        count = min(room, rng.choices((0, 1, 2, 3, 4), (4, 33, 35, 20, 8))[0])
        tool = _tool(rng, held_out, count)
        if words.isdisjoint(tool.noun.split()) and tool.name not in [other.name for other in tools]:
            tools.append(tool)
            words.update(tool.noun.split())
            room -= count
    while len(tools) > 1 and len(json.dumps([tool.schema() for tool in tools])) > _MAX_SCHEMA_CHARS:
        tools.pop()
    return tools


def _shown(value: Value) -> str:
    """A value as a person writes it, quoted where it has several words."""
    if isinstance(value, str):
        return f'"{value}"' if " " in value else value
    return json.dumps(value)


def make_call(rng: random.Random, held_out: bool, tool: Tool) -> Call:
    """A call of the tool and the request for it. Required parameters are always given, others half of the time."""
    given = [parameter for parameter in tool.parameters if parameter.required or rng.random() < 0.5]
    arguments = {parameter.name: _held(rng, held_out, parameter.role.value) for parameter in given}
    if rng.random() < 0.2:
        rng.shuffle(given)
    # Without descriptions only the names say which value is whose.
    by_role = all(parameter.description for parameter in given) and rng.random() < 0.45
    details = _by_role(given, arguments) if by_role else _by_name(rng, given, arguments)
    verb, _, thing = tool.task.partition(" ")
    if verb in _GETTERS and rng.random() < 0.4:
        return Call(tool, arguments, say(rng, f"(what is|tell me|give me|I want to know|show me) {thing}") + details)
    return Call(tool, arguments, tool.task + details)


def _by_role(given: list[Parameter], arguments: dict[str, Value]) -> str:
    """` in Paris for 3 days`"""
    parts = []
    for parameter in given:
        value, phrase = arguments[parameter.name], parameter.role.phrase
        if isinstance(value, bool):
            parts.append(phrase.split("|")[0 if value else 1])
        else:
            parts.append(phrase.format(_shown(value)))
    return "".join(" " + part for part in parts)


def _by_name(rng: random.Random, given: list[Parameter], arguments: dict[str, Value]) -> str:
    """` with city Paris and days 3`, and other forms that name the parameters."""
    if not given:
        return ""
    link, between, start = rng.choice(
        (
            (" ", "and", " with "),
            (" ", "and", " with "),
            (" ", "and", " with the "),
            (" is ", ",", ": "),
            (" ", ",", ": "),
            (": ", ",", ", "),
            ("=", ",", " with "),
            ("=", " ", ": "),
            (" set to ", "and", " with "),
        )
    )
    spoken = rng.random() < 0.5 and link != "="
    words = rng.choice((("true", "false"), ("true", "false"), ("yes", "no"), ("on", "off")))
    pairs = []
    for parameter in given:
        value = arguments[parameter.name]
        shown = words[0 if value else 1] if isinstance(value, bool) else _shown(value)
        pairs.append(f"{parameter.name.replace('_', ' ') if spoken else parameter.name}{link}{shown}")
    return start + (joined(pairs) if between == "and" else f"{between} ".replace("  ", " ").join(pairs))


def _request(rng: random.Random, calls: list[Call]) -> str:
    first, *others = (call.request for call in calls)
    opening = say(
        rng,
        "(|||Please |Can you |Could you |I want you to |I need to |Hi, please |Would you |Now |You should |Help me )",
    )
    if not first.startswith(calls[0].tool.task):
        opening = ""  # a question of its own
    text = capital(opening + first)
    for other in others:
        text += say(rng, "(, and |, then |, and then |. Also, |. Then )") + other
    if opening.startswith(("Can", "Could", "Would")) or text.startswith("What"):
        return text + "?"
    return text + say(rng, "(.|.|.|| now.|. Thanks.|, please.)")


def _tool_calls(calls: list[Call]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": call.tool.name, "arguments": call.arguments}} for call in calls]


def _plan(calls: list[Call]) -> str:
    """Which tools, in order. Arguments are left to the call: a model this small errs more often copying them twice."""
    return f"I call {joined([call.tool.name for call in calls])}."


_RESULT_KEYS = listed("""result total price status temperature distance count name place answer number amount time
code level size weight color state speed id""")
_STATUS = listed("done open closed ready late sold new full empty busy free warm cold lost found waiting")
_ERRORS = "not found|no connection|access denied|too many requests|the service is closed|unknown code|out of stock"


def _result_value(rng: random.Random, held_out: bool) -> Value:
    makers: tuple[Callable[[random.Random], Value], ...] = (_integer, _number, _place, any_word, _code)
    if rng.random() < 0.15:
        return rng.choice(_STATUS)
    return _held(rng, held_out, rng.choice(makers))


def _result(rng: random.Random, style: Style, call: Call) -> tuple[str, str]:
    """A tool's result, and what the assistant says of it."""
    noun, kind = call.tool.noun, rng.random()
    if kind < 0.1:
        error = say(rng, f"({_ERRORS})")
        return json.dumps({"error": error}), f"That did not work: {error}."
    if kind < 0.3:
        value = _shown_result(_result_value(rng, style.held_out))
        return value, f"{value}." if style.brief else f"The {noun}: {value}."
    if kind < 0.4:
        done = rng.choice(("ok", "done", '{"ok": true}', '{"status": "ok"}'))
        return done, "Done." if style.brief else f"Done: {call.tool.task}."
    keys = rng.sample(_RESULT_KEYS, rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.4:
        keys[0] = any_word(rng)
    values = {key: _result_value(rng, style.held_out) for key in keys}
    said = joined([f"the {key} is {_shown_result(value)}" for key, value in values.items()])
    return json.dumps(values), capital(said) + "."


def _shown_result(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def call_turn(rng: random.Random, style: Style, tools: list[Tool]) -> Turn:
    """A request that one or two calls serve, the calls, their results, and the answer."""
    calls = [make_call(rng, style.held_out, rng.choice(tools))]
    if rng.random() < 0.15:
        other = make_call(rng, style.held_out, rng.choice(tools))
        if other.tool is not calls[0].tool or other.arguments != calls[0].arguments:
            calls.append(other)
    results = [_result(rng, style, call) for call in calls]
    answer = " ".join(said for _, said in results)
    content = "; ".join(result for result, _ in results)
    messages: list[Message] = [
        user(_request(rng, calls)),
        assistant(style, _plan(calls), "", tool_calls=_tool_calls(calls)),
        *({"role": "tool", "content": result} for result, _ in results),
        assistant(style, f"The result: {content}", answer),
    ]
    expected = [{"name": call.tool.name, "arguments": call.arguments} for call in calls]
    return Turn(messages, {"calls": expected})


def no_tool_turn(rng: random.Random, style: Style, tools: list[Tool]) -> Turn:
    """A request that none of the tools serves: it is answered without one, or refused."""
    kind = rng.random()
    if kind < 0.25:
        return addition(rng, style)
    if kind < 0.5:
        return small_talk(rng, style)
    if kind < 0.6:
        return out_of_scope(rng, style)
    taken = {word for tool in tools for word in tool.noun.split()}
    other = _tool(rng, style.held_out, rng.choice((1, 2)))
    while not taken.isdisjoint(other.noun.split()):
        other = _tool(rng, style.held_out, 1)
    names = joined([tool.name for tool in tools])
    answer = say(rng, "(I have no tool for that.|None of my tools can do that.)")
    if not style.brief and rng.random() < 0.5:
        answer += f" I have {names}."
    request = user(_request(rng, [make_call(rng, style.held_out, other)]))
    return Turn([request, assistant(style, "None of the tools fits.", answer)])


def tool_turns(rng: random.Random, style: Style, turns: int) -> tuple[list[Turn], list[dict[str, Any]]]:
    """Requests over one set of tools, and the tools' schemas."""
    tools = make_tools(rng, style.held_out)
    made = [
        no_tool_turn(rng, style, tools) if rng.random() < 0.15 else call_turn(rng, style, tools) for _ in range(turns)
    ]
    return made, [tool.schema() for tool in tools]
