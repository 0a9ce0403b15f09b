"""Questions about a scene with exact answers, made from its facts alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tools.demo_model.facts import Facts
from tools.demo_model.phrases import word_question
from tools.demo_model.vocabulary import CITIES, LAMPS, LIGHTS, PAINT, SCREEN_WORDS, word_from

ABSENT = "not visible"
ORDINALS = ("first", "second", "third", "fourth", "fifth")

SINGLE_ITEM = (
    "speed",
    "limit",
    "gear",
    "fuel",
    "temperature",
    "light",
    "destination",
    "distance",
    "plate",
    "screen line",
    "time",
)
LONG = ("screen", "sign", "describe")


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, and its kind (a key of ``phrases.PATTERNS``)."""

    kind: str
    text: str
    answer: str


# An answer maker gives the placeholders of the wording and the answer.
Answered = tuple[dict[str, str], str]
Maker = Callable[[Facts, random.Random], Answered]


def _or_absent(value: object, text: str) -> str:
    return ABSENT if value is None else text


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _reading(name: str, form: str = "{}") -> Maker:
    """Asks for what one instrument or sign shows."""

    def answer(facts: Facts, _: random.Random) -> Answered:
        value = getattr(facts, name)
        return {}, _or_absent(value, form.format(value))

    return answer


def _speed(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.speed, f"{facts.speed} {facts.unit}")


def _line_number(count: int, rng: random.Random) -> tuple[int, dict[str, str]]:
    """A line that exists or, one time in ten, may not; and its placeholders."""
    i = rng.randrange(count) if count and rng.random() < 0.9 else rng.randrange(len(ORDINALS))
    return i, {"ordinal": ORDINALS[i], "number": str(i + 1)}


def _destination(facts: Facts, rng: random.Random) -> Answered:
    sign = facts.sign or ()
    i, values = _line_number(len(sign), rng)
    return values, sign[i][0] if i < len(sign) else ABSENT


def _screen_line(facts: Facts, rng: random.Random) -> Answered:
    lines = facts.screen or ()
    i, values = _line_number(len(lines), rng)
    return values, lines[i] if i < len(lines) else ABSENT


def _distance(facts: Facts, rng: random.Random) -> Answered:
    sign = dict(facts.sign or ())
    place = rng.choice(list(sign)) if sign and rng.random() < 0.9 else word_from(rng, CITIES)
    return {"place": place}, f"{sign[place]} km" if place in sign else ABSENT


def _time(facts: Facts, rng: random.Random) -> Answered:
    """Asks for the time of a word that stands beside exactly one time, or beside none."""
    words: dict[str, list[str]] = {}
    for line in facts.screen or ():
        if ":" in line:
            time, word = line.split(" ", 1)
            words.setdefault(word, []).append(time)
    unique = {word: times[0] for word, times in words.items() if len(times) == 1}
    word = rng.choice(list(unique)) if unique and rng.random() < 0.95 else word_from(rng, SCREEN_WORDS)
    return {"word": word}, unique.get(word, ABSENT)


def _lamps(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.lamps, ", ".join(facts.lamps or ()) or "none")


def _lamp_on(facts: Facts, rng: random.Random) -> Answered:
    lamps = facts.lamps or ()
    lamp = rng.choice(lamps) if lamps and rng.random() < 0.5 else rng.choice(LAMPS)
    return {"lamp": lamp}, _or_absent(facts.lamps, _yes(lamp in lamps))


def _lamp_count(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.lamps, str(len(facts.lamps or ())))


def _car_count(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.cars, str(len(facts.cars or ())))


def _colour(facts: Facts, rng: random.Random) -> str:
    return rng.choice(facts.cars) if facts.cars and rng.random() < 0.65 else rng.choice(list(PAINT))


def _colour_count(facts: Facts, rng: random.Random) -> Answered:
    colour = _colour(facts, rng)
    return {"colour": colour}, _or_absent(facts.cars, str((facts.cars or ()).count(colour)))


def _colour_seen(facts: Facts, rng: random.Random) -> Answered:
    colour = rng.choice(facts.cars) if facts.cars and rng.random() < 0.4 else rng.choice(list(PAINT))
    return {"colour": colour}, _or_absent(facts.cars, _yes(colour in (facts.cars or ())))


def _cars(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.cars, ", ".join(facts.cars or ()))


def _compare_speed(facts: Facts, _: random.Random) -> Answered:
    if facts.speed is None or facts.limit is None:
        return {}, ABSENT
    return {}, _yes(facts.speed > facts.limit)


def _compare_places(facts: Facts, rng: random.Random) -> Answered:
    sign = dict(facts.sign or ())
    if len(sign) < 2:
        place, other = rng.sample(CITIES, 2)
        return {"place": place, "other": other}, ABSENT
    place, other = rng.sample(list(sign), 2)
    values = {"place": place, "other": other}
    if sign[place] == sign[other]:
        return values, "both the same"
    return values, place if sign[place] < sign[other] else other


def _compare_colours(facts: Facts, rng: random.Random) -> Answered:
    colour = _colour(facts, rng)
    other = rng.choice([c for c in PAINT if c != colour])
    cars = facts.cars or ()
    return {"colour": colour, "other": other}, _or_absent(facts.cars, _yes(cars.count(colour) > cars.count(other)))


def _light_is(facts: Facts, rng: random.Random) -> Answered:
    colour = facts.light if facts.light and rng.random() < 0.4 else rng.choice(LIGHTS)
    return {"colour": colour}, _or_absent(facts.light, _yes(colour == facts.light))


def _freezing(facts: Facts, _: random.Random) -> Answered:
    return {}, ABSENT if facts.temperature is None else _yes(facts.temperature < 0)


def _line_count(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.screen, str(len(facts.screen or ())))


def _screen(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.screen, ", ".join(facts.screen or ()))


def _sign_text(facts: Facts) -> str:
    return ", ".join(f"{place} {km} km" for place, km in facts.sign or ())


def _sign(facts: Facts, _: random.Random) -> Answered:
    return {}, _or_absent(facts.sign, _sign_text(facts))


def _sentences(facts: Facts) -> Iterator[str]:
    """One sentence for every item that is there, always in the same order."""
    if facts.speed is not None:
        yield f"The speed is {facts.speed} {facts.unit}."
    if facts.limit is not None:
        yield f"The limit is {facts.limit}."
    if facts.gear is not None:
        yield f"The gear is {facts.gear}."
    if facts.fuel is not None:
        yield f"The fuel is at {facts.fuel}%."
    if facts.temperature is not None:
        yield f"It is {facts.temperature} C outside."
    if facts.lamps is not None:
        yield f"Warning lamps: {', '.join(facts.lamps) or 'none'}."
    if facts.light is not None:
        yield f"The traffic light is {facts.light}."
    if facts.plate is not None:
        yield f"The plate is {facts.plate}."
    if facts.cars is not None:
        yield f"Parked cars: {', '.join(facts.cars)}."
    if facts.sign is not None:
        yield f"The sign says {_sign_text(facts)}."
    if facts.screen is not None:
        yield f"The screen shows {len(facts.screen)} lines."


def _describe(facts: Facts, _: random.Random) -> Answered:
    return {}, " ".join(_sentences(facts)) or ABSENT


# Kind of question: how to answer it, and how often it is asked.
MAKERS: dict[str, tuple[Maker, float]] = {
    "speed": (_speed, 1.0),
    "limit": (_reading("limit"), 1.0),
    "gear": (_reading("gear"), 0.8),
    "fuel": (_reading("fuel", "{}%"), 0.8),
    "temperature": (_reading("temperature", "{} C"), 1.0),
    "light": (_reading("light"), 0.8),
    "destination": (_destination, 1.6),
    "distance": (_distance, 1.4),
    "plate": (_reading("plate"), 1.6),
    "screen line": (_screen_line, 2.0),
    "time": (_time, 1.0),
    "lamps": (_lamps, 0.8),
    "lamp on": (_lamp_on, 0.5),
    "lamp count": (_lamp_count, 0.4),
    "car count": (_car_count, 0.8),
    "colour count": (_colour_count, 0.9),
    "colour seen": (_colour_seen, 0.5),
    "cars": (_cars, 1.0),
    "compare speed": (_compare_speed, 0.5),
    "compare places": (_compare_places, 0.7),
    "compare colours": (_compare_colours, 0.4),
    "light is": (_light_is, 0.3),
    "freezing": (_freezing, 0.3),
    "line count": (_line_count, 0.4),
    "screen": (_screen, 1.2),
    "sign": (_sign, 1.0),
    "describe": (_describe, 0.8),
}
KINDS = tuple(MAKERS)


def ask(facts: Facts, kind: str, rng: random.Random) -> Question:
    """A question of ``kind`` about a scene, in a random wording, with its exact answer."""
    maker, _ = MAKERS[kind]
    values, answer = maker(facts, rng)
    return Question(kind, word_question(kind, values, rng), answer)


def choose_kind(rng: random.Random, kinds: Sequence[str] = KINDS) -> str:
    """One of ``kinds``, as often as it is worth asking."""
    return rng.choices(kinds, [MAKERS[kind][1] for kind in kinds])[0]


def ask_any(facts: Facts, rng: random.Random, absent: float = 0.3, kinds: Sequence[str] = KINDS) -> Question:
    """A question of a random kind; one whose item is absent is kept with probability ``absent``."""
    while True:
        question = ask(facts, choose_kind(rng, kinds), rng)
        if question.answer != ABSENT or rng.random() < absent:
            return question
