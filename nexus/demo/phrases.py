"""What can be said in the micro-world: families of topics and every sentence about each.

A topic is a tuple of values, such as (3, 5) of `plus`; `Family.talk` turns it into all its questions with their answers
and into statements. Lower case, no punctuation, numbers spelled out. The vocabulary holds no two words that sound
alike (therefore "into" and "tell me", never "to" and "for"). Nothing here draws or splits: see `world`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, permutations, product

Topic = tuple[str | int, ...]


@dataclass(frozen=True)
class Item:
    """A question with its whole-sentence answer. `key` names what is held out: a combination or fact and phrasing."""

    family: str
    key: str
    question: str
    answer: str


@dataclass(frozen=True)
class Talk:
    """All that is said about one topic: (question, answer) in a fixed order of phrasings, and statements."""

    asks: tuple[tuple[str, str], ...] = ()
    statements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of topic.

    `realm` begins the keys; families of one realm share their topics and what is held out of them. `asked` is the
    share among questions, `said` among sentences. A `fact` cannot be derived from others, so its phrasings are held
    out one by one; of all other families whole topics are.
    """

    name: str
    realm: str
    topics: tuple[Topic, ...]
    talk: Callable[[Topic], Talk]
    asked: float
    said: float
    fact: bool = False


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (pair.split() for pair in text.split(","))
    return tuple((first, second) for first, second in pairs)


_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
OPPOSITES = _pairs(
    "hot cold,big small,long short,fast slow,happy sad,young old,strong weak,hard soft,wet dry,rich poor,"
    "early late,light dark,day night,loud quiet,near far,full empty,clean dirty,sweet bitter,north south,"
    "east west,winter summer,friend enemy,left right,top bottom"
)
CAPITALS = _pairs(
    "france paris,germany berlin,italy rome,spain madrid,portugal lisbon,greece athens,austria vienna,"
    "poland warsaw,hungary budapest,russia moscow,japan tokyo,china beijing,egypt cairo,kenya nairobi,"
    "cuba havana,peru lima,canada ottawa,norway oslo,sweden stockholm,finland helsinki,ireland dublin,"
    "england london,belgium brussels,denmark copenhagen"
)
# None begins with a vowel: always "a", never "an".
COLOURS = ("red", "green", "blue", "yellow", "purple", "pink", "brown", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
CELLS = (
    "top left",
    "top middle",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom middle",
    "bottom right",
)
ROOMS = ("kitchen", "bedroom", "garden", "office", "hall", "garage", "bathroom", "cellar")

_SWITCHED = ("lamp", "radio", "fan", "heater")
_OPENED = ("door", "window", "box", "drawer")
_MOVED = ("chair", "table", "carpet", "basket")
# action: (the things it is done with, the orders with {0} for the thing and {1} for the room, what it leads to)
_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "on": (_SWITCHED, ("turn on {0} in {1}", "switch on {0} in {1}"), "{0} in {1} is on"),
    "off": (_SWITCHED, ("turn off {0} in {1}", "switch off {0} in {1}"), "{0} in {1} is off"),
    "open": (_OPENED, ("open {0} in {1}",), "{0} in {1} is open"),
    "close": (_OPENED, ("close {0} in {1}", "shut {0} in {1}"), "{0} in {1} is closed"),
    "clean": (_MOVED, ("clean {0} in {1}", "wash {0} in {1}"), "{0} in {1} is clean"),
    "bring": (_MOVED, ("bring {0} into {1}", "move {0} into {1}"), "{0} is in {1}"),
}

_ARITHMETIC_ASKS = (
    "what is {0}",
    "how much is {0}",
    "tell me {0}",
    "what does {0} make",
    "please tell me what {0} is",
    "can you tell me how much {0} is",
    "say how much {0} is please",
)
_OPPOSITE_ASKS = (
    "what is the opposite of {0}",
    "tell me the opposite of {0}",
    "please name the opposite of {0}",
    "which word is the opposite of {0}",
    "can you name the opposite of {0}",
    "what word means the opposite of {0}",
    "say the opposite of {0} please",
    "can you tell me what the opposite of {0} is",
)
_CAPITAL_ASKS = (
    "what is the capital of {0}",
    "tell me the capital of {0}",
    "please name the capital of {0}",
    "which city is the capital of {0}",
    "can you name the capital of {0}",
    "what city is the capital of {0}",
    "say the capital of {0} please",
    "can you tell me what the capital of {0} is",
)
_COMPARE_ASKS = (
    "is {0} {2} than {1}",
    "tell me if {0} is {2} than {1}",
    "please say if {0} is {2} than {1}",
    "can you tell me if {0} is {2} than {1}",
    "do you think {0} is {2} than {1}",
    "is it true that {0} is {2} than {1}",
)
_WHICH_ASKS = (
    "which is {2} {0} or {1}",
    "what is {2} {0} or {1}",
    "tell me which is {2} {0} or {1}",
    "which number is {2} {0} or {1}",
    "please say which is {2} {0} or {1}",
    "can you tell me which is {2} {0} or {1}",
)
_COMMAND_ASKS = (
    "{0}",
    "please {0}",
    "{0} please",
    "can you {0}",
    "can you please {0}",
    "now {0}",
)


@cache
def number_words(number: int) -> str:
    """A number 0..99 in words: 42 is "forty two"."""
    assert 0 <= number <= 99, number
    if number < 20:
        return _BELOW_TWENTY.split()[number]
    tens, ones = divmod(number, 10)
    return _TENS.split()[tens - 2] + (f" {number_words(ones)}" if ones else "")


def _arithmetic(operation: str, topic: Topic) -> Talk:
    left, right = map(int, topic)
    result = {"plus": left + right, "minus": left - right, "times": left * right}[operation]
    problem, number = f"{number_words(left)} {operation} {number_words(right)}", number_words(result)
    answer = f"{problem} is {number}"
    return Talk(
        tuple((ask.format(problem), answer) for ask in _ARITHMETIC_ASKS),
        (f"{problem} makes {number}", f"i think {problem} is {number}"),
    )


def _opposite(topic: Topic) -> Talk:
    word, other = topic
    answer = f"the opposite of {word} is {other}"
    return Talk(
        tuple((ask.format(word), answer) for ask in _OPPOSITE_ASKS),
        (f"{other} is the opposite of {word}", f"{word} and {other} are opposites"),
    )


def _capital(topic: Topic) -> Talk:
    country, city = topic
    answer = f"the capital of {country} is {city}"
    return Talk(
        tuple((ask.format(country), answer) for ask in _CAPITAL_ASKS),
        (f"{city} is the capital of {country}", f"{city} is a city in {country}"),
    )


def _compare(topic: Topic) -> Talk:
    low, high = int(topic[0]), int(topic[1])
    asks = []
    for left, right in ((low, high), (high, low)):
        for relation, holds in (("bigger", left > right), ("smaller", left < right)):
            first, second = number_words(left), number_words(right)
            verdict = f"yes {first} is {relation}" if holds else f"no {first} is not {relation}"
            asks += [(ask.format(first, second, relation), f"{verdict} than {second}") for ask in _COMPARE_ASKS]
    small, big = number_words(low), number_words(high)
    return Talk(tuple(asks), (f"i think {big} is bigger than {small}", f"i think {small} is smaller than {big}"))


def _which(topic: Topic) -> Talk:
    low, high = number_words(int(topic[0])), number_words(int(topic[1]))
    answers = {"bigger": f"{high} is bigger than {low}", "smaller": f"{low} is smaller than {high}"}
    orders = ((low, high), (high, low))
    return Talk(
        tuple(
            (ask.format(first, second, relation), answer)
            for first, second in orders
            for relation, answer in answers.items()
            for ask in _WHICH_ASKS
        )
    )


def _command(topic: Topic) -> Talk:
    action, colour, thing, room = map(str, topic)
    _, orders, result = _ACTIONS[action]
    place = (f"the {colour} {thing}", f"the {room}")
    state = result.format(*place)
    asks = tuple((ask.format(order.format(*place)), f"okay {state}") for order in orders for ask in _COMMAND_ASKS)
    return Talk(asks, (f"{state} now", f"i think {state}"))


def _travel(topic: Topic) -> Talk:
    country, city = topic
    frames = (
        "my friend from {0} lives in {1}",
        "my friend from {0} likes {1}",
        "the train from {1} is now in {0}",
        "summer in {0} and winter in {1}",
    )
    return Talk(statements=tuple(frame.format(country, city) for frame in frames))


def _words(topic: Topic) -> Talk:
    frames = ("{0} and {1} are words", "first say {0} then {1}", "the word {0} is not {1}", "i like {0} and {1}")
    return Talk(statements=tuple(frame.format(*topic) for frame in frames))


def _sight(topic: Topic) -> Talk:
    frames = (
        "i can see the {0} {1} in the {2}",
        "how many shapes are near the {0} {1} in the {2}",
        "what colour is the shape near the {0} {1} in the {2}",
        "where is the shape near the {0} {1} in the {2}",
        "is there one shape near the {0} {1} in the {2}",
    )
    return Talk(statements=tuple(frame.format(*topic) for frame in frames))


def _topics(*axes: Iterable[str | int]) -> tuple[Topic, ...]:
    return tuple(product(*axes))


_NUMBER_PAIRS = tuple(combinations(range(100), 2))
_SUMS = _topics(range(13), range(13))
_DIFFERENCES = tuple((left, right) for left in range(21) for right in range(left + 1))
_PRODUCTS = _topics(range(2, 7), range(2, 7))
_FAR = tuple(product(range(21, 41), range(21)))
_FACES = tuple(face for pair in OPPOSITES for face in (pair, pair[::-1]))  # both directions
_TRIPS = _topics([country for country, _ in CAPITALS], [city for _, city in CAPITALS])
_WORD_PAIRS = tuple(permutations([word for pair in OPPOSITES for word in pair], 2))
_ORDERS = tuple(
    topic for action, (things, _, _) in _ACTIONS.items() for topic in _topics([action], COLOURS, things, ROOMS)
)

# `travel`, `words` and `sight` ask nothing that is answered: they say the names of facts and the words of picture
# questions in many combinations, because those facts and questions themselves are too few to be held out as speech.
FAMILIES = (
    Family("plus", "plus", _SUMS, partial(_arithmetic, "plus"), asked=3.0, said=1.5),
    Family("minus", "minus", _DIFFERENCES, partial(_arithmetic, "minus"), asked=3.0, said=1.5),
    Family("times", "times", _PRODUCTS, partial(_arithmetic, "times"), asked=0.8, said=0.5),
    Family("opposite", "opposite", _FACES, _opposite, asked=1.5, said=1.5, fact=True),
    Family("capital", "capital", CAPITALS, _capital, asked=1.3, said=1.0, fact=True),
    Family("compare", "compare", _NUMBER_PAIRS, _compare, asked=3.5, said=1.5),
    Family("which", "compare", _NUMBER_PAIRS, _which, asked=3.5, said=1.0),
    Family("command", "command", _ORDERS, _command, asked=1.5, said=2.5),
    Family("travel", "travel", _TRIPS, _travel, asked=0.0, said=1.5),
    Family("words", "words", _WORD_PAIRS, _words, asked=0.0, said=1.5),
    Family("sight", "sight", _topics(COLOURS, SHAPES, CELLS), _sight, asked=0.0, said=0.7),
)

# Sums just beyond those that are asked, to be learned in writing alone. The few hundred that are asked can be known by
# heart and then say nothing of the others; these cannot, and what is learned from them holds for the smaller ones too.
FAR_SUMS = tuple(
    Family(name, name, topics, partial(_arithmetic, name), asked=share, said=0.0)
    for name, topics, share in (
        ("plus", tuple((total - right, right) for total, right in _FAR if max(total - right, right) > 12), 0.3),
        ("minus", _FAR, 0.7),
    )
)


def key_of(family: Family, topic: Topic) -> str:
    """The combination as text: "compare|4|9"."""
    return "|".join(map(str, (family.realm, *topic)))
