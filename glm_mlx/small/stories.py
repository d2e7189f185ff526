"""Short stories, and questions that the story answers.

A story is a list of sentences. Each sentence brings the questions that it, and no other sentence, answers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from glm_mlx.small.turns import Style, Turn, assistant, turn, user
from glm_mlx.small.words import (
    ANIMALS,
    COLOURS,
    FIRST_NAMES,
    NUMBER_WORDS,
    OBJECTS,
    PLACES,
    capital,
    first_name,
    is_held_out,
    listed,
    plural,
    say,
    with_article,
)

_ADJECTIVES = listed("little small young old clever shy brave kind quiet cheerful sleepy curious hungry friendly")
_FEELINGS = listed("happy proud glad tired sleepy calm merry surprised thankful cheerful")
_WEATHERS = listed("sunny rainy windy cold warm foggy snowy cloudy stormy")
_ACTIONS = listed("danced sang played ran swam laughed walked talked ate painted climbed rested")
_TIMES = "morning|day|evening|afternoon|night"
_DEEDS = (("found", "find"), ("saw", "see"), ("lost", "lose"), ("bought", "buy"), ("made", "make"), ("hid", "hide"))
_GIFTS = (("gave", "give"), ("brought", "bring"), ("showed", "show"), ("sold", "sell"))

_NOT_TOLD = "The story does not say."


@dataclass(frozen=True)
class Question:
    """`sentence` is the one of the story that holds the answer, which has `word` and none of `rivals`."""

    text: str
    sentence: str
    short: str
    full: str
    word: str
    rivals: list[str]


@dataclass
class Story:
    sentences: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    plan: str = ""  # the reasoning of whoever tells it
    untold: list[str] = field(default_factory=list)  # questions that it does not answer

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def make_story(rng: random.Random, held_out: bool, about: dict[str, str] | None = None, told: bool = False) -> Story:
    """A story of three to six sentences; `about` may fix the animal, name, object, colour or place.

    `told`: by the assistant, which takes names that it knows. Were every invented name as likely, the likeliest second
    name would be the first one again.
    """
    return _Teller(rng, held_out, about or {}, _known_name if told else _any_name).tell()


# The names that the assistant likes best come first; as friends, in the opposite order.
_OWN_NAMES = {side: [name for name in FIRST_NAMES if is_held_out(name) == side] for side in (False, True)}
_OWN_WEIGHTS = {side: [1 / rank for rank in range(2, len(_OWN_NAMES[side]) + 2)] for side in (False, True)}


def _any_name(rng: random.Random, held_out: bool, friend: bool) -> str:
    return first_name(rng, held_out)


def _known_name(rng: random.Random, held_out: bool, friend: bool) -> str:
    if rng.random() < 0.1:
        return first_name(rng, held_out)
    names = _OWN_NAMES[held_out]
    return rng.choices(names[::-1] if friend else names, _OWN_WEIGHTS[held_out])[0]


class _Teller:
    """One story in the making: its facts, drawn at the start, and its sentences."""

    def __init__(
        self,
        rng: random.Random,
        held_out: bool,
        about: dict[str, str],
        make_name: Callable[[random.Random, bool, bool], str],
    ) -> None:
        self.rng = rng
        self.animal, self.other_animal = _two(rng, ANIMALS, about.get("animal"))
        self.thing, self.other_thing = _two(rng, OBJECTS, about.get("object"))
        self.colour, self.other_colour = _two(rng, COLOURS, about.get("colour"))
        self.place, self.home = _two(rng, list(PLACES), about.get("place"))
        self.number, self.other_number = rng.sample((1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9), 2)
        if self.number == self.other_number:
            self.other_number = self.number % 9 + 1
        self.name = about.get("name") or make_name(rng, held_out, False)
        self.friend = self.name
        while self.friend == self.name:
            self.friend = make_name(rng, held_out, True)
        self.names = [self.name, self.friend]
        self.has_friend = False
        self.story = Story()

    def tell(self) -> Story:
        rng, told = self.rng, self.story
        told.plan = f"{self.name} the {self.animal}, {self._things()}, {PLACES[self.place]}"
        self._intro()
        if rng.random() < 0.4:
            self._home()
        else:
            told.untold.append(f"Where did {self.name} live?")
        if rng.random() < 0.25:
            self._weather()
        else:
            told.untold.append("What was the weather like?")
        self._deed()
        if rng.random() < 0.75:
            self._friend()
            if rng.random() < 0.65:
                self._gift()
            if len(told.sentences) < 6 and rng.random() < 0.5:
                self._action()
        if len(told.sentences) < 6 and (len(told.sentences) < 3 or rng.random() < 0.6):
            self._end()
        else:
            told.untold.append(f"How did {self.name} feel?")
        return told

    def _tell(self, pattern: str) -> str:
        sentence = capital(say(self.rng, pattern))
        self.story.sentences.append(sentence)
        return sentence

    def _question(
        self, sentence: str, pattern: str, short: str, full: str, word: str, rivals: list[str] | tuple[str, ...]
    ) -> None:
        others = [rival for rival in rivals if rival != word]
        text = say(self.rng, pattern)
        self.story.questions.append(Question(text, sentence, capital(short) + ".", capital(full) + ".", word, others))

    def _things(self, number: int = 0) -> str:
        """`a red cup`, `three red cups`."""
        number = number or self.number
        if number == 1:
            return f"{with_article(self.colour)} {self.thing}"
        return f"{NUMBER_WORDS[number]} {self.colour} {plural(self.thing)}"

    @property
    def _noun(self) -> str:
        return self.thing if self.number == 1 else plural(self.thing)

    def _intro(self) -> None:
        adjective, name, animal = self.rng.choice(_ADJECTIVES), self.name, self.animal
        sentence = self._tell(
            f"(Once there was {with_article(adjective)} {animal} named {name}."
            f"|There was once {with_article(animal)} called {name}.|{name} was {with_article(adjective)} {animal}."
            f"|Once upon a time, {with_article(animal)} called {name} had a good idea."
            f"|This is the story of {name}, {with_article(adjective)} {animal}.)"
        )
        kind = f"(What (kind of |)animal (was|is) {name}?|What was {name}?|Which animal is {name}?)"
        self._question(sentence, kind, with_article(animal), f"{name} was {with_article(animal)}", animal, ANIMALS)
        who = f"(What was the {animal} called?|What was the name of the {animal}?|What was the {animal}'s name?)"
        self._question(sentence, who, name, f"The {animal} was called {name}", name, self.names)

    def _home(self) -> None:
        name, where = self.name, PLACES[self.home]
        sentence = self._tell(
            f"({name} lived {where}.|{capital(where)} was the home of {name}.|{name} had a house {where}.)"
        )
        pattern = f"(Where did {name} live?|Where was {name}'s home?|Where was the home of {name}?)"
        self._question(sentence, pattern, where, f"{name} lived {where}", self.home, tuple(PLACES))

    def _weather(self) -> None:
        weather = self.rng.choice(_WEATHERS)
        sentence = self._tell(f"It was a {weather} ({_TIMES}).")
        pattern = "(What was the weather like?|How was the weather?|What kind of weather was it?)"
        self._question(sentence, pattern, f"It was {weather}", f"The weather was {weather}", weather, _WEATHERS)

    def _deed(self) -> None:
        """Somebody finds, sees, loses … something somewhere; this sentence answers most questions."""
        did, do = self.rng.choice(_DEEDS)
        name, where, things, noun = self.name, PLACES[self.place], self._things(), self._noun
        sentence = self._tell(
            f"(One ({_TIMES}), {name} {did} {things} {where}.|{name} {did} {things} {where}."
            f"|{capital(where)}, {name} {did} {things}.|Then {name} {did} {things} {where}."
            f"|One day {name} {did} {things} {where}.)"
        )
        them = "it" if self.number == 1 else "them"
        nouns = [form for thing in OBJECTS for form in (thing, plural(thing)) if thing != self.thing]
        self._question(sentence, f"What did {name} {do}?", things, f"{name} {did} {things}", noun, nouns)
        self._question(
            sentence,
            f"Where did {name} {do} (the {noun}|{them})?",
            where,
            f"{name} {did} the {noun} {where}",
            self.place,
            tuple(PLACES),
        )
        self._question(sentence, f"Who {did} the {noun}?", name, f"{name} {did} the {noun}", name, self.names)
        be = "was" if self.number == 1 else "were"
        self._question(
            sentence,
            f"(Which|What) colo(|u)r {be} the {noun}?",
            self.colour,
            f"The {noun} {be} {self.colour}",
            self.colour,
            COLOURS,
        )
        number = NUMBER_WORDS[self.number]
        if self.number > 1:
            self._question(
                sentence,
                f"How many {noun} (did {name} {do}|were there)?",
                number,
                f"{name} {did} {number} {noun}",
                number,
                NUMBER_WORDS,
            )
        self._do = do

    def _friend(self) -> None:
        """A second character, half of the time with a thing of its own: a question must look at the right one."""
        friend, animal, name = self.friend, self.other_animal, self.name
        self.has_friend = True
        own = f"{NUMBER_WORDS[self.other_number]} {self.other_colour} {plural(self.other_thing)}"
        if self.other_number == 1:
            own = f"{with_article(self.other_colour)} {self.other_thing}"
        if self.rng.random() < 0.5:
            sentence = self._tell(
                f"({friend} the {animal} came by.|Soon {friend} the {animal} came along."
                f"|{name} met {friend} the {animal}.)"
            )
        else:
            sentence = self._tell(
                f"({friend} the {animal} came along with {own}.|Soon {name} met {friend} the {animal}, who had {own}.|"
                f"{friend} the {animal} had {own}.)"
            )
            one = self.other_number == 1
            noun, be = (self.other_thing, "was") if one else (plural(self.other_thing), "were")
            self._question(
                sentence,
                f"(Which|What) colo(|u)r {be} the {noun}?",
                self.other_colour,
                f"The {noun} {be} {self.other_colour}",
                self.other_colour,
                COLOURS,
            )
            nouns = [form for thing in OBJECTS for form in (thing, plural(thing)) if thing != self.other_thing]
            self._question(sentence, f"What did {friend} have?", own, f"{friend} had {own}", noun, nouns)
            self._question(sentence, f"Who had the {noun}?", friend, f"{friend} had the {noun}", friend, self.names)
            if not one:
                number = NUMBER_WORDS[self.other_number]
                pattern = f"How many {noun} (did {friend} have|were there)?"
                self._question(sentence, pattern, number, f"{friend} had {number} {noun}", number, NUMBER_WORDS)
        kind = f"(What (kind of |)animal (was|is) {friend}?|What was {friend}?|Which animal is {friend}?)"
        self._question(sentence, kind, with_article(animal), f"{friend} was {with_article(animal)}", animal, ANIMALS)
        who = f"(What was the {animal} called?|What was the name of the {animal}?|What was the {animal}'s name?)"
        self._question(sentence, who, friend, f"The {animal} was called {friend}", friend, self.names)

    def _gift(self) -> None:
        gave, give = self.rng.choice(_GIFTS)
        name, friend, noun = self.name, self.friend, self._noun
        sentence = self._tell(f"({name} {gave} the {noun} to {friend}.|So {name} {gave} the {noun} to {friend}.)")
        self._question(
            sentence,
            f"(Who did {name} {give} the {noun} to?|To whom did {name} {give} the {noun}?)",
            friend,
            f"It was {friend}",
            friend,
            self.names,
        )
        self._question(sentence, f"Who {gave} the {noun} to {friend}?", name, f"It was {name}", name, self.names)

    def _action(self) -> None:
        action = self.rng.choice(_ACTIONS)
        sentence = self._tell(
            f"(They {action} together.|{self.name} and {self.friend} {action} until it was dark."
            f"|They {action} all day.)"
        )
        pattern = "(What did they do together?|What did they do?|What did the two friends do?)"
        self._question(sentence, pattern, f"They {action}", f"They {action}", action, _ACTIONS)

    def _end(self) -> None:
        feeling = self.rng.choice(_FEELINGS)
        who = self.friend if self.has_friend and self.rng.random() < 0.3 else self.name
        sentence = self._tell(
            f"({who} was {feeling}.|In the end {who} was very {feeling}.|{who} felt {feeling} and went home."
            f"|At last {who} was {feeling} and fell asleep.)"
        )
        pattern = f"(How did {who} feel|How was {who}) (in the end|at the end|)?"
        feelings = f"{who} was {feeling}"
        self._question(sentence, pattern, feelings, feelings, feeling, _FEELINGS)


def _two(rng: random.Random, words: list[str], first: str | None) -> tuple[str, str]:
    """Two different words; the first may be given."""
    one, other = rng.sample(words, 2)
    if first is None or first == one:
        return one, other
    return first, one


_SUBJECTS: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "animal": lambda rng, _: _same_and(rng.choice(ANIMALS), with_article),
    "object": lambda rng, _: _same_and(rng.choice(OBJECTS), with_article),
    "place": lambda rng, _: _same_and(rng.choice(list(PLACES)), lambda place: f"something {PLACES[place]}"),
    "colour": lambda rng, _: _same_and(rng.choice(COLOURS), lambda colour: f"something {colour}"),
    "name": lambda rng, held_out: _same_and(first_name(rng, held_out), str),
}


def _same_and(word: str, phrase: Callable[[str], str]) -> tuple[str, str]:
    return word, phrase(word)


def story_request(rng: random.Random, style: Style) -> tuple[Turn, Story]:
    """The user asks for a story, most often about something, and gets it."""
    about: dict[str, str] = {}
    phrases = []
    for subject in rng.sample(list(_SUBJECTS), rng.choices((0, 1, 2), (20, 65, 15))[0]):
        about[subject], phrase = _SUBJECTS[subject](rng, style.held_out)
        phrases.append(phrase)
    topic = f" about {' and '.join(phrases)}" if phrases else ""
    request = say(
        rng,
        f"(Tell me a( short|) story{topic}(.|, please.|)|Please tell (me |)a story{topic}."
        f"|Can you tell (me |us |)a story{topic}?|(Write|Make up|I want|I'd like) a( short|) story{topic}."
        f"|A story{topic}(.|, please.)|Do you know a story{topic}?)",
    )
    story = make_story(rng, style.held_out, about, told=True)
    return turn(style, request, f"A story: {story.plan}.", story.text), story


def question_turn(rng: random.Random, style: Style, question: Question, before: str = "") -> Turn:
    """A question about the story; `before` is a story that the user brings with it."""
    answer = question.short if style.brief or rng.random() < 0.4 else question.full
    quote = f"The story says: {question.sentence}"
    return turn(style, before + question.text, quote, answer, word=question.word, rivals=question.rivals)


def _untold_turn(rng: random.Random, style: Style, story: Story) -> Turn:
    return turn(style, rng.choice(story.untold), _NOT_TOLD, _NOT_TOLD)


def story_turns(rng: random.Random, style: Style, questions: int) -> list[Turn]:
    """A story, told by the assistant or given by the user, then this many questions (at least one if given)."""
    if given := rng.random() < 0.35:
        story = make_story(rng, style.held_out)
        turns = []
    else:
        first, story = story_request(rng, style)
        turns = [first]
    asked = rng.sample(story.questions, min(max(questions, given), len(story.questions)))
    for number, question in enumerate(asked):
        before = ""
        if given and number == 0:
            before = say(rng, "(Here is a story: |Read this story. |This is my story: |Story: |)") + story.text
            before += say(rng, "( |\n|\nQuestion: )")
        turns.append(question_turn(rng, style, question, before))
    if turns and story.untold and rng.random() < 0.06:
        turns.append(_untold_turn(rng, style, story))
    if given and rng.random() < 0.1:
        turns[0] = _only_told(rng, style, story)
        turns[1:] = turns[2:]  # the first question went with the story
    return turns


def _only_told(rng: random.Random, style: Style, story: Story) -> Turn:
    """The user brings a story without a question."""
    answer = say(
        rng, "(Thank you for the story. What do you want to know?|A nice story. Do you have a question about it?)"
    )
    message = user(say(rng, "(Here is a story: |Listen: |This is my story: )") + story.text)
    return Turn([message, assistant(style, "The user tells a story.", answer)])
