"""Addition, subtraction, sorting and counting, with working that a tiny model can follow step by step.

The working has one form for each task; the questions vary. Numbers go from the right, digit by digit.
"""

import random
import zlib

from glm_mlx.small.turns import Style, Turn, turn
from glm_mlx.small.words import (
    ANIMALS,
    COLOURS,
    FIRST_NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    any_word,
    capital,
    joined,
    plural,
    say,
)

WORDS = sorted({*ANIMALS, *COLOURS, *OBJECTS, *PLACES, *NOUNS})

_ADDITIONS = (
    "(What is|What's|How much is|Calculate|Compute|Work out) {a} + {b}(?|)",
    "{a} + {b}",
    "{a}+{b}(=|?|)",
    "{a} + {b} = (?|)",
    "(What is|How much is|What's) {a} plus {b}?",
    "{a} plus {b}(?|)",
    "(Please add|Add|Can you add) {a} and {b}.",
    "(What is|Give me|I need) the sum of {a} and {b}(?|.)",
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have (now|)?",
    "There are {a} {things} in one box and {b} in another. How many (are there|{things} are there) (in all|together)?",
    "If I have {a} {things} and buy {b} more, how many do I have?",
)
_SUBTRACTIONS = (
    "(What is|What's|How much is|Calculate|Compute|Work out) {a} - {b}(?|)",
    "{a} - {b}",
    "{a}-{b}(=|?|)",
    "{a} - {b} = (?|)",
    "(What is|How much is|What's) {a} minus {b}?",
    "{a} minus {b}(?|)",
    "(Please subtract|Subtract|Can you take|Take) {b} from {a}.",
)
_TAKEN_AWAY = (
    "{name} has {a} {things} and gives away {b}. How many {things} (are left|does {name} have now)?",
    "There were {a} {things}, and {b} are gone. How many are left?",
)
_SORTING = (
    "(Sort|Order|Arrange|Please sort|Can you sort) (these words|the words|) (alphabetically|in alphabetical order"
    "|by the alphabet): {words}",
    "(Sort|Please sort|Alphabetize|Sort these|Sort the words): {words}",
    "(Put|Please put) (these words|) in (alphabetical|ABC) order: {words}",
    "Which order do these words have in the alphabet: {words}?",
)
_COUNTING = (
    '(How many words are in|How many words does this have:|Count the words (in|of)|Count the words:) "{words}"(?|)',
    "(How many words are there|How many words|Count the words|Please count these words|Count|How many words is this):"
    " {words}",
)


def _is_held_out(a: int, b: int) -> bool:
    """One pair of numbers in five, in either order, is kept for the exam: training could see all 8,100 otherwise."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 5 == 0


def _pair(rng: random.Random, held_out: bool, digits: int) -> tuple[int, int]:
    """Two numbers of this many digits at most; the first has all of them."""
    while True:
        a = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        b = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        if rng.random() < 0.1:
            b = rng.randrange(10 ** rng.randint(1, digits))
        # So few one-digit sums exist that they are drill, not exam.
        if digits == 1 or _is_held_out(a, b) == held_out:
            return (a, b) if rng.random() < 0.5 else (b, a)


def add_working(a: int, b: int) -> str:
    """`47+38: 7+8=15, write 5 carry 1; 4+3+1=8, write 8; 85`: columns from the right, then the result."""
    steps: list[str] = []
    carry, x, y = 0, a, b
    while x or y or carry or not steps:
        total = x % 10 + y % 10 + carry
        shown = f"{x % 10}+{y % 10}" + ("+1" if carry else "")
        carry = total // 10
        steps.append(f"{shown}={total}, write {total % 10}" + (" carry 1" if carry else ""))
        x, y = x // 10, y // 10
    return f"{a}+{b}: " + "; ".join(steps) + f"; {a + b}"


def subtract_working(a: int, b: int) -> str:
    """`52-37: 12-7=5, write 5 borrow 1; 5-1-3=1, write 1; 15`. A negative result is worked the other way round."""
    if a < b:
        return f"{a}-{b}: {a} is less than {b}, so minus; {subtract_working(b, a)}; -{b - a}"
    steps: list[str] = []
    borrow, x, y = 0, a, b
    while x or y or not steps:
        top, taken = x % 10, y % 10
        borrows = top - borrow < taken
        top += 10 if borrows else 0
        written = top - borrow - taken
        shown = f"{top}-1-{taken}" if borrow else f"{top}-{taken}"
        steps.append(f"{shown}={written}, write {written}" + (" borrow 1" if borrows else ""))
        borrow = int(borrows)
        x, y = x // 10, y // 10
    return f"{a}-{b}: " + "; ".join(steps) + f"; {a - b}"


def _digits(rng: random.Random) -> int:
    return rng.choices((1, 2, 3), (15, 65, 20))[0]


def _ask(rng: random.Random, patterns: tuple[str, ...], a: int, b: int) -> str:
    things = plural(rng.choice(OBJECTS))
    return say(rng, rng.choice(patterns)).format(a=a, b=b, name=rng.choice(FIRST_NAMES), things=things)


def _result(rng: random.Random, style: Style, sum_text: str, result: int) -> str:
    if style.brief:
        return str(result)
    return rng.choice((str(result), f"{result}.", f"{sum_text} = {result}", f"The answer is {result}."))


def addition(rng: random.Random, style: Style, digits: int | None = None) -> Turn:
    a, b = _pair(rng, style.held_out, digits or _digits(rng))
    question = _ask(rng, _ADDITIONS, a, b)
    return turn(style, question, add_working(a, b), _result(rng, style, f"{a} + {b}", a + b), numbers=[a, b, a + b])


def subtraction(rng: random.Random, style: Style) -> Turn:
    a, b = _pair(rng, style.held_out, _digits(rng))
    if a < b and rng.random() < 0.8:
        a, b = b, a
    patterns = _SUBTRACTIONS + _TAKEN_AWAY if a >= b else _SUBTRACTIONS
    question = _ask(rng, patterns, a, b)
    result = _result(rng, style, f"{a} - {b}", a - b)
    return turn(style, question, subtract_working(a, b), result, numbers=[a, b, a - b])


def sorting(rng: random.Random, style: Style) -> Turn:
    """Three to six words; two of them begin with the same letter in about one case of five."""
    words, prefix = _distinct_words(rng, 1 if rng.random() < 0.8 else 2)
    question = say(rng, rng.choice(_SORTING)).format(words=", ".join(words) if rng.random() < 0.8 else " ".join(words))
    in_order = sorted(words)
    keys = ", ".join(f"{word} {word[:prefix]}" for word in words)
    working = f"{keys}; in order {' '.join(word[:prefix] for word in in_order)}"
    answer = joined(in_order) if rng.random() < 0.2 and not style.brief else ", ".join(in_order)
    return turn(style, " ".join(question.split()), working, answer, words=in_order)


def _distinct_words(rng: random.Random, prefix: int) -> tuple[list[str], int]:
    """Words that their first `prefix` letters tell apart."""
    while True:
        words = rng.sample(WORDS, rng.choice((3, 3, 4, 4, 5, 6)))
        if len({word[:prefix] for word in words}) == len(words):
            return words, prefix


def counting(rng: random.Random, style: Style) -> Turn:
    count = rng.choice((1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9))
    words = [any_word(rng) for _ in range(count)]
    question = say(rng, rng.choice(_COUNTING)).format(words=(", " if rng.random() < 0.2 else " ").join(words))
    working = ", ".join(f"{word} {number}" for number, word in enumerate(words, 1))
    full = f"There (is|are) {count} words.".replace("(is|are)", "is" if count == 1 else "are")
    answer = str(count) if style.brief or rng.random() < 0.5 else full.replace("1 words", "1 word")
    return turn(style, capital(question), working, answer, numbers=[count])
