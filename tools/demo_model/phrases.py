"""The wordings of every kind of question.

A pattern offers alternatives in braces, ``{what is|what's} the speed``; placeholders in angle brackets are filled with
the facts of the scene.
"""

from __future__ import annotations

import random
import re

_CHOICE = re.compile(r"\{([^{}]*)\}")

PATTERNS: dict[str, tuple[str, ...]] = {
    "speed": (
        "{what is|what's|tell me|give me} {the|our|my|the current|the present} speed",
        "how fast {are we|am I|is the car|are you} {going|driving|moving}{| right now| now}",
        "{read|check} the {speedometer|speed}{| please}",
        "what {does the speedometer|speed does the dial} {say|show|read|indicate}",
        "{at what|what} speed {are we|am I} {driving|going|travelling|moving}",
    ),
    "limit": (
        "{what is|what's|tell me} the {speed limit|limit|maximum speed}{| here}",
        "how fast {may|can|am I allowed to|are we allowed to} {I |we |}{drive|go}{| here}",
        "what does the {speed limit sign|limit sign|round sign} {say|show}",
        "{which|what} {speed limit|limit} {applies|is posted|is in force}{| here}",
        "read the {speed limit|speed limit sign|limit}",
    ),
    "gear": (
        "{which|what} gear {is engaged|is selected|is it in|are we in|is the car in|am I in|is on}",
        "{what is|what's|tell me} the {gear|current gear|selected gear}",
        "what does the gear {display|indicator} {say|show}",
        "read the gear{| display| indicator}",
    ),
    "fuel": (
        "how much {fuel|gas|petrol} {is left|do we have|is there|remains|do we have left|is in the tank}",
        "{what is|what's|tell me} the {fuel level|fuel|level of the fuel|fuel state}",
        "how full is the {tank|fuel tank}",
        "{read|check} the fuel{| gauge| level}",
        "what does the fuel gauge {say|show}",
    ),
    "temperature": (
        "{what is|what's|tell me} the {temperature|outside temperature|temperature outside|outdoor temperature}",
        "how {warm|cold|hot} is it{| outside| out there}",
        "how many degrees {is it|are there}{| outside}",
        "{read|check} the {temperature|thermometer}",
        "what does the thermometer {say|show}",
    ),
    "light": (
        "{what|which} {color|colour} is the {traffic light|light|signal|traffic signal}",
        "{what is|what's} the {traffic light|light} {showing|color|colour}",
        "is the {traffic light|light} red, yellow or green",
        "{what is|what's|tell me} the {state|color|colour} of the {traffic light|light|signal}",
        "what does the traffic light {say|show}",
    ),
    "destination": (
        "{what|which} {place|town|city|destination} is on {the <ordinal> line|line <number>} of the "
        "{sign|road sign|direction sign}",
        "{what is|what's|read|tell me} the <ordinal> {place|destination|town|city|name} on the "
        "{sign|road sign|direction sign}",
        "{what is|read} {the <ordinal> name|name <number>} on the {sign|road sign}",
    ),
    "distance": (
        "how far {is it to|is|away is|is it from here to} <place>",
        "{what is|what's|tell me} the distance to <place>",
        "how many {kilometres|kilometers|km} {is it|are left|remain} to <place>",
        "how far {do we have|must we go|do I have} to <place>",
    ),
    "plate": (
        "{what is|what's|tell me} the {plate|license plate|licence plate|number plate|plate number|registration}",
        "read the {plate|license plate|licence plate|number plate|registration}{| number}",
        "{what|which} {number|registration} is on the {plate|number plate|license plate}",
        "what does the {plate|license plate|number plate} {say|read}",
    ),
    "screen line": (
        "{what does|read} {the <ordinal> line|line <number>} {of|on} the {screen|display}{| say}",
        "{what is|what's|what is written|what stands} {on|in} {the <ordinal> line|line <number>} of the "
        "{screen|display}",
        "{read|tell me|give me} {the <ordinal> line|line <number>} {of|on} the {screen|display|monitor}",
        "read {screen line <number>|the <ordinal> screen line}",
    ),
    "time": (
        "{what time|which time} {is next to|belongs to|stands before|is shown for|is beside} <word>",
        "{at what time|when} {is|was|does the screen show|did we get} <word>",
        "{what is|tell me} the time of <word>",
    ),
    "lamps": (
        "{which|what} {warning lamps|warning lights|lamps|warnings} are {on|lit|active|showing}",
        "{list|name|tell me} the {warning lamps|warning lights|warnings}{| that are on}",
        "are {any|there any} {warning lamps|warning lights} on",
        "what does the {warning panel|lamp panel} show",
    ),
    "lamp on": (
        "is the <lamp> {lamp|light|warning|warning lamp|warning light} {on|lit|active|showing}",
        "{does|do you see if} the <lamp> {lamp|light|warning light} {glow|shine|burn}",
    ),
    "lamp count": (
        "how many {warning lamps|warning lights|lamps|warnings} are {on|lit|active}",
        "count the {warning lamps|warning lights|lamps}{| that are on}",
    ),
    "car count": (
        "how many {cars|vehicles} {are parked|are there|do you see|are in the car park|can you see|stand in the lot}",
        "count the {cars|parked cars|vehicles|cars in the car park}",
        "{what is|tell me} the number of {cars|parked cars|vehicles}",
    ),
    "colour count": (
        "how many <colour> {cars|vehicles} {are parked|are there|do you see|are in the car park|can you see}",
        "count the <colour> {cars|parked cars|vehicles}",
        "{what is|tell me} the number of <colour> cars",
    ),
    "colour seen": (
        "is there {a|any} <colour> {car|vehicle}{| in the car park| parked}",
        "{do|can} you see a <colour> {car|vehicle}",
        "is {a|any} car <colour>",
    ),
    "cars": (
        "{list|name|tell me} the {colors|colours} of the {cars|parked cars|vehicles}",
        "{what|which} {colors|colours} are the {cars|parked cars|vehicles}",
        "{list|name|describe} the {parked cars|cars|cars in the car park}{| from left to right| row by row}",
    ),
    "compare speed": (
        "are we {above|over|exceeding|breaking|faster than} the {limit|speed limit}",
        "{are we|am I|is the car} {speeding|too fast|going too fast|driving too fast}",
        "{is the speed|are we} {higher than|above|over} the {limit|speed limit}",
    ),
    "compare places": (
        "{which|what} is {nearer|closer}, <place> or <other>",
        "{which|what} {place|city|town} is {nearer|closer}: <place> or <other>",
        "is <place> or <other> {nearer|closer}",
    ),
    "compare colours": (
        "are there more <colour> cars than <other> {cars|ones}",
        "do you see more <colour> than <other> cars",
    ),
    "light is": (
        "is the {traffic light|light|signal} <colour>",
        "{does the traffic light show|do we have} <colour>{| now}",
    ),
    "freezing": (
        "is it {freezing|below zero|below freezing}{| outside}",
        "{is the temperature|is it} {below zero|under zero|negative}",
    ),
    "line count": (
        "how many lines {are on|does|has} the {screen|display}{| show}",
        "count the lines {on|of} the {screen|display}",
    ),
    "screen": (
        "read the {screen|display|whole screen|screen aloud|infotainment screen|entire screen}",
        "what {does the screen say|does the display show|is on the screen|is written on the screen|"
        "does the screen show}",
        "{read|list|tell me} {all lines|every line|everything} on the {screen|display}",
        "{read|give me} the text {of|on} the {screen|display}",
    ),
    "sign": (
        "{read|list} the {sign|road sign|direction sign}",
        "what {does the sign say|does the road sign say|is on the sign|does the direction sign show}",
        "{list|name|read} all {places|destinations|cities|towns} on the sign{| with their distances}",
        "where {does the sign point|does the road lead|do the signs lead}{| to}",
    ),
    "describe": (
        "{describe|explain|summarize} {the scene|the picture|the image|what you see|everything|the situation}",
        "what {do you see|is in the picture|is in the image|is going on|is happening|can you see}",
        "{give me|write} a {description|summary} of the {scene|picture|image}",
        "tell me {everything|what you see|all you see}",
    ),
}


def expand(pattern: str, rng: random.Random) -> str:
    """One wording of ``pattern``: an alternative is chosen in every pair of braces."""
    return _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), pattern)


def _fill(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    return text


def _finish(text: str, rng: random.Random) -> str:
    """Capitals, politeness and punctuation as people type them."""
    if rng.random() < 0.1:
        text = rng.choice(("please ", "can you tell me: ", "look: ", "hey, ")) + text
    elif rng.random() < 0.06:
        text += rng.choice((", please", " in the picture", " in this image"))
    if rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    asks = re.match(r"(?i)(what|which|how|is|are|do|does|can|at|where|when|am)\b", text) is not None
    ending = "?" if asks else "."
    return text + (ending if rng.random() < 0.85 else "")


def word_question(kind: str, values: dict[str, str], rng: random.Random) -> str:
    """A question of ``kind`` about ``values``, in one of its many wordings."""
    pattern = rng.choice(PATTERNS[kind])
    return _finish(_fill(expand(pattern, rng), values), rng)
