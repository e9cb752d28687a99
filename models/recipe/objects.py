"""What the embedded model is taught to draw: objects, styles and colours, and what stays unseen.

An object is named by its CLDR slug ("hot-beverage"), which all emoji sets share, and called in
captions by the noun beside it.
"""

from dataclasses import dataclass

from models.recipe.more_objects import MORE_OBJECTS

# Never in the training data of a model, in any style: the concepts that users teach it.
HELD_OUT_OBJECTS = (
    "crown",
    "fox",
    "guitar",
    "octopus",
    "owl",
    "pineapple",
    "rocket",
    "snail",
    "sunflower",
    "teapot",
    "teddy-bear",
    "tractor",
)

# Objects that every set draws alike enough to be learned from few pictures, and that one names at
# a glance at 64 pixels. Slug: noun, where the noun is not the slug.
SMALL_OBJECTS = {
    # animals
    "dog-face": "dog",
    "cat-face": "cat",
    "mouse-face": "mouse",
    "rabbit-face": "rabbit",
    "bear": "bear",
    "panda": "panda",
    "koala": "koala",
    "tiger-face": "tiger",
    "lion": "lion",
    "cow-face": "cow",
    "pig-face": "pig",
    "frog": "frog",
    "monkey-face": "monkey",
    "wolf": "wolf",
    "unicorn": "unicorn",
    "penguin": "penguin",
    "bird": "bird",
    "duck": "duck",
    "flamingo": "flamingo",
    "honeybee": "bee",
    "lady-beetle": "ladybug",
    "butterfly": "butterfly",
    "turtle": "turtle",
    "crab": "crab",
    "squid": "squid",
    "tropical-fish": "fish",
    "dolphin": "dolphin",
    "spouting-whale": "whale",
    "elephant": "elephant",
    # plants and food
    "rose": "rose",
    "tulip": "tulip",
    "blossom": "flower",
    "cactus": "cactus",
    "evergreen-tree": "pine tree",
    "palm-tree": "palm tree",
    "mushroom": "mushroom",
    "red-apple": "apple",
    "banana": "banana",
    "watermelon": "watermelon",
    "grapes": "grapes",
    "strawberry": "strawberry",
    "cherries": "cherries",
    "lemon": "lemon",
    "carrot": "carrot",
    "eggplant": "eggplant",
    "hamburger": "hamburger",
    "pizza": "pizza",
    "doughnut": "donut",
    "birthday-cake": "cake",
    "soft-ice-cream": "ice cream",
    "hot-beverage": "cup",
    # vehicles and places
    "automobile": "car",
    "bus": "bus",
    "locomotive": "train",
    "airplane": "airplane",
    "helicopter": "helicopter",
    "sailboat": "sailboat",
    "bicycle": "bicycle",
    "delivery-truck": "truck",
    "house": "house",
    "castle": "castle",
    # things
    "balloon": "balloon",
    "soccer-ball": "ball",
    "umbrella": "umbrella",
    "key": "key",
    "light-bulb": "light bulb",
    "bell": "bell",
    "wrapped-gift": "gift",
    "trophy": "trophy",
    "top-hat": "hat",
    "violin": "violin",
    "skull": "skull",
    "robot": "robot",
    "jack-o-lantern": "pumpkin",
    "snowman-without-snow": "snowman",
    "sun": "sun",
    "star": "star",
    "red-heart": "heart",
    "gem-stone": "diamond",
    "anchor": "anchor",
}

# What `base` names, `small`'s objects among them.
BASE_OBJECTS = SMALL_OBJECTS | MORE_OBJECTS

# The pack holds every object of these CLDR groups that all sets draw, less the people and the flags
# of meaning (clocks by the hour, moons by the phase): the autoencoder gains from all of them.
_PACKED_GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)

_NOT_CONCRETE = ("moon", "clock", "oclock", "thirty", "button", "squared", "keycap", "person")


@dataclass(frozen=True, slots=True)
class Style:
    """One emoji set: the word that captions use for it, and where it comes from."""

    word: str
    package: str
    version: str
    licence: str
    author: str


STYLES = (
    Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", "Google"),
    Style("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter and contributors"),
    Style("flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft"),
    Style("glossy", "@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft"),
    # Held out: a style that users teach, and CC-BY-SA, which so never reaches the weights.
    Style("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji contributors"),
)
HELD_OUT_STYLE = "openmoji"
TRAINING_STYLES = tuple(style.word for style in STYLES if style.word != HELD_OUT_STYLE)

# sRGB, chosen to be told apart at a glance and to have one plain name each.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 22),
    "gray": (150, 152, 156),
    "red": (220, 50, 47),
    "orange": (245, 140, 40),
    "yellow": (250, 214, 60),
    "green": (60, 165, 75),
    "lime": (170, 220, 70),
    "teal": (30, 160, 160),
    "turquoise": (110, 220, 215),
    "blue": (45, 95, 220),
    "navy": (30, 40, 100),
    "purple": (130, 70, 180),
    "pink": (250, 160, 195),
    "brown": (130, 85, 55),
    "beige": (232, 214, 180),
}
# An object is repainted in these only: the others are not words that one says of a thing.
OBJECT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")


def is_concrete(slug: str, group: str) -> bool:
    """Whether an emoji of this slug and CLDR group is a thing that one can draw and name."""
    if group not in _PACKED_GROUPS or slug in HELD_OUT_OBJECTS:
        return False
    return not any(word in slug.split("-") for word in _NOT_CONCRETE)


def noun_of(slug: str) -> str:
    """What captions call an object: for one that is not named, the words of its slug."""
    return BASE_OBJECTS.get(slug) or slug.removesuffix("-face").replace("-", " ")


# By their last word. Neither takes an article.
_PLURALS = (
    *("grapes", "cherries", "blueberries", "pancakes", "peanuts", "fries", "glasses", "sunglasses"),
    *("jeans", "gloves", "socks", "scissors", "headphones", "maracas"),
)
_SUBSTANCES = (
    *("corn", "broccoli", "garlic", "bread", "cheese", "bacon", "popcorn", "sushi"),
    *("spaghetti", "beer", "milk", "tea", "yarn", "fire", "coral", "soap"),
    "paper",
)
_IRREGULAR = {
    "mouse": "mice",
    "wolf": "wolves",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
}
_UNCHANGED = (
    *("fish", "jellyfish", "pufferfish", "cream", "sheep", "squid", "deer", "moose", "bison"),
    *("shrimp", "dice"),
)


def plural(noun: str) -> str:
    """The plural of a noun, by the rules that the nouns of this module need."""
    *before, last = noun.split()
    return " ".join([*before, _plural_of_word(last)])


def _plural_of_word(word: str) -> str:
    if word in (*_PLURALS, *_SUBSTANCES, *_UNCHANGED):
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "ch", "sh", "x")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def with_article(noun_phrase: str, definite: bool = False) -> str:
    """ "an apple", "the apple", "grapes": a noun phrase as it stands in a sentence."""
    if definite:
        return f"the {noun_phrase}"
    if noun_phrase.split()[-1] in (*_PLURALS, *_SUBSTANCES):
        return noun_phrase
    vowel = noun_phrase.startswith(("a", "e", "i", "o", "um", "hour"))
    return f"{'an' if vowel else 'a'} {noun_phrase}"
