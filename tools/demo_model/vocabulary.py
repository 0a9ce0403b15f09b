"""The words, colours and symbols that scenes are made of, and the label numbers of the auxiliary tasks."""

from __future__ import annotations

import random
import string

Colour = tuple[int, int, int]

CITIES = [
    "PARIS",
    "LYON",
    "METZ",
    "LILLE",
    "NICE",
    "ROME",
    "MILAN",
    "TURIN",
    "BERLIN",
    "BONN",
    "KOELN",
    "MAINZ",
    "ULM",
    "OSLO",
    "BERGEN",
    "MALMO",
    "LUND",
    "GENT",
    "BRUGGE",
    "DELFT",
    "LEIDEN",
    "YORK",
    "LEEDS",
    "BATH",
    "DOVER",
    "DUBLIN",
    "CORK",
    "PORTO",
    "FARO",
    "MADRID",
    "SEVILLA",
    "BILBAO",
    "ZURICH",
    "BERN",
    "BASEL",
    "GENEVA",
    "VIENNA",
    "GRAZ",
    "LINZ",
    "PRAGUE",
    "BRNO",
    "WARSAW",
    "LODZ",
    "GDANSK",
    "RIGA",
    "VILNIUS",
    "TALLINN",
    "ATHENS",
    "PATRAS",
    "SOFIA",
    "VARNA",
]
SCREEN_WORDS = [
    "CALL",
    "HOME",
    "WORK",
    "RADIO",
    "MUSIC",
    "MAP",
    "FUEL",
    "STOP",
    "PARK",
    "NEWS",
    "MAIL",
    "TEXT",
    "FROM",
    "ANNA",
    "BOB",
    "CARL",
    "DORA",
    "EMIL",
    "FRED",
    "GINA",
    "HUGO",
    "IDA",
    "JACK",
    "KATE",
    "LEO",
    "MARY",
    "NINA",
    "OTTO",
    "PAUL",
    "ROSA",
    "SAM",
    "TINA",
    "URSULA",
    "VERA",
    "WILL",
    "XENIA",
    "YVES",
    "ZOE",
    "EXIT",
    "LEFT",
    "RIGHT",
    "NEXT",
    "TURN",
    "TRAFFIC",
    "DELAY",
    "ROUTE",
    "TOLL",
    "BRIDGE",
    "TUNNEL",
    "CHARGE",
    "SERVICE",
    "OPEN",
    "CLOSED",
    "RAIN",
    "SNOW",
    "WIND",
    "FOG",
]
GEARS = "PRND"
UNITS = ("km/h", "mph")
LIMITS = (20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130)
LAMPS = ("oil", "battery", "engine", "brake", "belt")
LIGHTS = ("red", "yellow", "green")
FUEL_SEGMENTS = 5
PAINT: dict[str, Colour] = {
    "red": (215, 35, 35),
    "blue": (40, 70, 220),
    "green": (30, 160, 60),
    "yellow": (235, 205, 40),
    "white": (240, 240, 240),
    "purple": (150, 50, 180),
}
MAX_SCREEN_LINES = 5
MAX_SIGN_LINES = 4

# Label 0 means "nothing here" in every auxiliary task.
CHARACTERS = string.ascii_uppercase + string.digits + "/:.%-"
CHARACTER_ID = {c: i + 1 for i, c in enumerate(CHARACTERS)}
FIELDS = (
    *(f"screen{i}" for i in range(MAX_SCREEN_LINES)),
    *(f"place{i}" for i in range(MAX_SIGN_LINES)),
    *(f"distance{i}" for i in range(MAX_SIGN_LINES)),
    *("speed", "unit", "gear", "plate", "limit", "temperature"),
)
FIELD_ID = {name: i + 1 for i, name in enumerate(FIELDS)}
OBJECTS = (
    *(f"car_{c}" for c in PAINT),
    *(f"lamp_{name}" for name in LAMPS),
    *(f"light_{c}" for c in LIGHTS),
    *(f"fuel_{i}" for i in range(FUEL_SEGMENTS + 1)),
)
OBJECT_ID = {name: i + 1 for i, name in enumerate(OBJECTS)}

NUM_CHARACTERS = len(CHARACTERS) + 1
NUM_FIELDS = len(FIELDS) + 1
NUM_INDICES = 24
NUM_OBJECTS = len(OBJECTS) + 1

_CONSONANTS = "BCDFGHJKLMNPRSTVWXZ"
_VOWELS = "AEIOU"


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of 4 to 7 capitals, so that reading cannot be replaced by guessing from a list."""
    word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3)))
    return word + (rng.choice(_CONSONANTS) if rng.random() < 0.4 else "")


def word_from(rng: random.Random, words: list[str], invented: float = 0.3) -> str:
    """A word of the list, or with probability ``invented`` a new one."""
    return invented_word(rng) if rng.random() < invented else rng.choice(words)
