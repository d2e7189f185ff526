"""The words that the corpus is made of, and the split of names and values between training and exam.

All lists are our own. What is split is the whole name or value, not the word: `kind` may be a parameter of the exam
alone, but then training has `kind_color` and the value `kind`. A model this small cannot copy a token that it never
copied in training, and no exam is about that.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence


def listed(words: str) -> list[str]:
    return words.split()


ANIMALS = listed("""fox owl bear mouse rabbit cat dog hen duck goat sheep horse frog toad crow swan wolf deer mole
badger otter beaver hedgehog squirrel snail turtle crab seal whale pony donkey goose sparrow robin bee ant beetle
spider lizard camel tiger lion panda zebra parrot""")
COLOURS = listed("red blue green yellow white black brown pink purple orange grey golden silver")
OBJECTS = listed("""cup hat ball button stone shell apple pear lamp kite drum bell book key ring coin basket ribbon
feather candle spoon plate carrot lemon boot mitten map bottle blanket flower acorn pebble whistle rope bucket marble
pillow pin cookie pumpkin turnip lantern flag jar stick brush bead cap pencil""")
PLACES = {  # the noun -> where, as a phrase
    "garden": "in the garden",
    "forest": "in the forest",
    "river": "by the river",
    "lake": "at the lake",
    "mill": "near the mill",
    "bridge": "under the bridge",
    "market": "at the market",
    "hill": "on the hill",
    "barn": "behind the barn",
    "beach": "on the beach",
    "cave": "in a cave",
    "meadow": "in the meadow",
    "tower": "in the tower",
    "well": "beside the well",
    "school": "near the school",
    "harbor": "at the harbor",
    "orchard": "in the orchard",
    "village": "in the village",
    "attic": "in the attic",
    "kitchen": "in the kitchen",
    "station": "at the station",
    "pond": "by the pond",
    "valley": "in the valley",
    "castle": "in the castle",
    "island": "on a small island",
    "road": "on the road",
    "fence": "next to the fence",
    "oak": "under an old oak",
}
FIRST_NAMES = listed("""Mira Tom Anna Leo Nora Ben Ida Max Lily Sam Rosa Finn Ella Otto Maya Jack Zoe Hugo Clara Emil
Ruby Paul Mona Felix Lena Oscar Alma Karl Tilda Noah Vera Simon Greta Adam Olga Peter Julia Martin Sara David""")
CITIES = listed("""Paris London Berlin Tokyo Rome Madrid Vienna Oslo Lisbon Prague Warsaw Dublin Athens Cairo Delhi
Lima Boston Chicago Denver Dallas Seattle Toronto Sydney Munich Hamburg Milan Zurich Geneva Lyon Porto Kyoto Seoul
Beijing Shanghai Moscow Istanbul Nairobi Lagos Quito Havana""")
NUMBER_WORDS = listed("zero one two three four five six seven eight nine ten eleven twelve")

VERBS = listed("""get find set show add send book open close start stop check list make read write plan count move
track order rent fetch update cancel call change create delete search save load print share sort store test turn watch
weigh paint measure pack join invite hire fill draw copy clean build buy sell bring ask answer pay park play post pull
push record remove repair report reserve ring send ship sign sing split switch trade train translate visit wash
convert compare approve assign archive attach collect compute deliver describe detect lock unlock mix order publish
rate scan""")
NOUNS = listed("""weather ticket table room lamp train order parcel song letter note alarm meeting taxi flight hotel
garden recipe price stock score game map route road bridge ship boat car bike bus truck wagon engine wheel tire door
window roof wall floor carpet chair desk shelf book page poem story report form file folder photo picture video camera
phone message mail stamp card coin bank loan bill tax wage salary job task project team club member guest party
concert theater movie museum painting statue park forest tree flower seed crop field farm barn cow sheep horse dog cat
bird fish river lake ocean wave tide storm rain snow wind cloud sun moon star planet rocket satellite signal radio
channel sensor switch light heater oven fridge kettle cup plate spoon knife bowl soup bread cheese butter egg milk
juice tea coffee sugar salt pepper fruit apple pear plum cherry grape lemon melon potato tomato carrot onion bean rice
wheat corn bottle box bag basket crate barrel pipe pump valve tank filter wire cable battery motor printer screen
keyboard mouse server backup password account profile badge key lock safe vault gate fence tower castle village town
city island harbor beach hill mountain valley cave mine stone gold silver iron copper wood paper glass cloth shirt
coat hat shoe boot glove scarf ring watch clock calendar holiday lesson course school pupil teacher exam grade library
doctor nurse clinic pill diet sleep walk run swim match medal trophy ball net goal court track ladder hammer nail
screw drill saw brush bucket broom towel soap mirror candle lantern torch match tent camp trail compass anchor sail
rope knot flag drum flute piano violin guitar choir dance stage ticket""")
PARAMETERS = listed("""city town place location region person name user customer owner guest sender count number
amount limit size quantity days hours minutes date day time hour price cost weight length height width depth speed
level volume temperature code id label title topic subject text message color style format language unit mode status
type kind category priority urgent express silent public private active enabled repeat remind visible page row column
index target source reason comment address street country floor room seat group team brand model version start end""")

_ONSETS = listed("b c d f g h j k l m n p r s t v w z br dr fl gr kr pl st tr th sh")
_VOWELS = listed("a e i o u a e i o ai ea oo")
_CODAS = ["", "", "", "", *listed("l n r s m t k nd rt ck")]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

EVERY_WORD = sorted({*ANIMALS, *COLOURS, *OBJECTS, *PLACES, *NUMBER_WORDS, *VERBS, *NOUNS, *PARAMETERS})

_PLURALS = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "knife": "knives"}
_PLURALS |= {"wolf": "wolves", "shelf": "shelves", "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes"}

_SALT = "glm-13:"
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_CHOICE = re.compile(r"\(([^()]*)\)")


def is_held_out(text: str, kind: str = "") -> bool:
    """True for the fifth of all names and values of a kind that only exams have.

    Writing and order of the words make no difference: getWeather, get_weather and weather_get fall on the same side.
    A kind of string is split by itself: what is only an exam's parameter may be training's value.
    """
    parts = sorted(part.lower() for part in _PARTS.findall(text))
    return zlib.crc32(f"{_SALT}{kind}{' '.join(parts)}".encode()) % 5 == 0


def on_side(rng: random.Random, held_out: bool, kind: str, make: Callable[[random.Random], str]) -> str:
    """What `make` makes, drawn until it is on the wanted side of the split."""
    while is_held_out(text := make(rng), kind) != held_out:
        pass
    return text


def invented(rng: random.Random) -> str:
    """A made-up word of two or three syllables, lower case."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)


def any_word(rng: random.Random, words: Sequence[str] = EVERY_WORD) -> str:
    """A word of the list, an invented one, or now and then letters that make no word."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(words)
    return invented(rng) if kind < 0.97 else "".join(rng.choices(_LETTERS, k=rng.randint(3, 6)))


def _name(rng: random.Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.5 else invented(rng).capitalize()


def first_name(rng: random.Random, held_out: bool) -> str:
    """A common or an invented first name."""
    return on_side(rng, held_out, "", _name)


def person(rng: random.Random) -> str:
    """A first name, or one with a family name."""
    return _name(rng) if rng.random() < 0.6 else f"{_name(rng)} {_name(rng)}"


def say(rng: random.Random, pattern: str) -> str:
    """The pattern with one alternative chosen in every `(a|b|)`, the innermost first."""
    while "(" in pattern:
        pattern = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern)
    return pattern.replace(" ?", "?")


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + "s"


def capital(text: str) -> str:
    """The first letter upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def joined(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
