"""The objects that `base` names and `small` does not.

Chosen from the pack by hand: what one names at a glance at 128 pixels. Left out are near doubles
(one train of five, one dog of four), symbols, papers, banknotes, weather by degrees, and buildings
that only their sign tells apart.
"""

# Called by the words of their CLDR slug.
_ANIMALS = """
    gorilla raccoon leopard moose donkey zebra deer bison goat camel llama giraffe mammoth
    rhinoceros hippopotamus hamster beaver hedgehog bat sloth otter skunk kangaroo turkey
    rooster dove eagle swan feather peacock parrot goose crocodile lizard snake seal shark coral
    jellyfish lobster shrimp ant spider spider-web scorpion polar-bear t-rex
"""
_PLANTS_AND_FOOD = """
    bouquet cherry-blossom seedling potted-plant maple-leaf tangerine pear blueberries tomato
    coconut avocado potato bell-pepper cucumber broccoli garlic onion peanuts bread croissant
    pretzel pancakes waffle bacon french-fries hot-dog sandwich taco egg popcorn rice-ball sushi
    spaghetti fortune-cookie cookie cupcake pie chocolate-bar candy lollipop baby-bottle
    wine-glass cocktail-glass tropical-drink bubble-tea spoon jar
"""
_VEHICLES_AND_PLACES = """
    compass volcano factory tent church fountain ferris-wheel roller-coaster bullet-train
    ambulance police-car taxi pickup-truck motorcycle skateboard roller-skate wheel stop-sign
    canoe speedboat ship parachute satellite flying-saucer watch thermometer cloud tornado
    rainbow snowflake comet fire
"""
_THINGS = """
    christmas-tree ribbon basketball volleyball boxing-glove ice-skate diving-mask sled yo-yo
    kite crystal-ball magic-wand joystick puzzle-piece chess-pawn yarn glasses sunglasses
    t-shirt jeans scarf gloves socks dress bikini handbag backpack graduation-cap lipstick ring
    megaphone microphone radio saxophone trumpet accordion banjo drum maracas telephone battery
    laptop printer keyboard floppy-disk abacus television camera candle flashlight scroll
    open-book coin money-bag envelope pencil paintbrush briefcase calendar pushpin paperclip
    scissors hammer axe dagger bomb boomerang bow-and-arrow shield wrench screwdriver gear
    balance-scale toolbox magnet ladder test-tube microscope telescope syringe stethoscope door
    mirror window bed chair toilet bathtub broom basket bucket soap toothbrush fire-extinguisher
    shopping-cart
"""
_RENAMED = {
    "kick-scooter": "scooter",
    "horse-face": "horse",
    "ewe": "sheep",
    "baby-chick": "chick",
    "dragon-face": "dragon",
    "sauropod": "dinosaur",
    "blowfish": "pufferfish",
    "spiral-shell": "shell",
    "bug": "caterpillar",
    "deciduous-tree": "tree",
    "four-leaf-clover": "clover",
    "nest-with-eggs": "nest",
    "kiwi-fruit": "kiwi",
    "ear-of-corn": "corn",
    "hot-pepper": "chili pepper",
    "baguette-bread": "baguette",
    "cheese-wedge": "cheese",
    "poultry-leg": "chicken leg",
    "cut-of-meat": "steak",
    "cooking": "frying pan",
    "honey-pot": "honey jar",
    "glass-of-milk": "milk",
    "bottle-with-popping-cork": "champagne bottle",
    "beer-mug": "beer",
    "ice": "ice cube",
    "kitchen-knife": "knife",
    "amphora": "vase",
    "globe-showing-europe-africa": "globe",
    "snow-capped-mountain": "mountain",
    "classical-building": "temple",
    "playground-slide": "slide",
    "fire-engine": "fire truck",
    "racing-car": "race car",
    "manual-wheelchair": "wheelchair",
    "vertical-traffic-light": "traffic light",
    "ring-buoy": "lifebuoy",
    "luggage": "suitcase",
    "hourglass-done": "hourglass",
    "ringed-planet": "planet",
    "high-voltage": "lightning bolt",
    "droplet": "water drop",
    "military-medal": "medal",
    "american-football": "football",
    "flying-disc": "frisbee",
    "fishing-pole": "fishing rod",
    "bullseye": "dartboard",
    "water-pistol": "water gun",
    "pool-8-ball": "billiard ball",
    "video-game": "game controller",
    "game-die": "dice",
    "mirror-ball": "disco ball",
    "nesting-dolls": "nesting doll",
    "artist-palette": "palette",
    "thread": "thread spool",
    "necktie": "tie",
    "shopping-bags": "shopping bag",
    "thong-sandal": "sandal",
    "running-shoe": "sneaker",
    "hiking-boot": "boot",
    "high-heeled-shoe": "high heel",
    "billed-cap": "cap",
    "military-helmet": "helmet",
    "headphone": "headphones",
    "musical-keyboard": "piano",
    "mobile-phone": "phone",
    "electric-plug": "plug",
    "desktop-computer": "computer",
    "clapper-board": "clapperboard",
    "magnifying-glass-tilted-left": "magnifying glass",
    "red-paper-lantern": "lantern",
    "closed-book": "book",
    "package": "box",
    "open-mailbox-with-raised-flag": "mailbox",
    "fountain-pen": "pen",
    "straight-ruler": "ruler",
    "locked": "padlock",
    "pick": "pickaxe",
    "carpentry-saw": "saw",
    "satellite-antenna": "satellite dish",
    "adhesive-bandage": "bandage",
    "couch-and-lamp": "couch",
    "roll-of-paper": "toilet paper",
}


def _by_slug() -> dict[str, str]:
    listed = (_ANIMALS, _PLANTS_AND_FOOD, _VEHICLES_AND_PLACES, _THINGS)
    plain = {slug: slug.replace("-", " ") for words in listed for slug in words.split()}
    return plain | {"t-rex": "t-rex", "t-shirt": "t-shirt", "yo-yo": "yo-yo"} | _RENAMED


MORE_OBJECTS = _by_slug()
