"""Common English words, for texts that are made up."""

from __future__ import annotations

import random

ADJECTIVES_TEXT = """
able ancient angry bitter blue bold brave brief bright broad brown calm careful cheap clean clear clever cold cool
curious dark dear deep dry dull early easy empty even faint fair famous fast fierce fine firm flat fond formal free
fresh full gentle glad golden good grand gray great green happy hard heavy high hollow honest huge humble icy jolly
keen kind large late lazy light little local lonely long loose loud lovely low loyal lucky mild modern narrow neat new
nice noble odd old open orange pale plain polite poor proud pure quick quiet rapid rare raw red rich rough round royal
sad safe secret sharp short shy silent silver simple slow small smart smooth soft solid sour steady steep stiff
strange strict strong sweet swift tall tame tender thick thin tidy tiny tired tough vast warm wet white whole wide
wild wise young
"""
NOUNS_TEXT = """
actor anchor animal apple arrow artist autumn baker ball banner barn basket beach bear bell bench berry bird blanket
boat book bottle bowl box branch bread bridge broom brother bucket button cabin cake camera camp candle canyon car
carpet castle cat chair chapel cherry child circle city clock cloud coat coin corner cottage cousin cow creek crown
cup curtain dancer desert desk doctor dog donkey door dragon dress drum eagle engine evening farmer feather fence
field fire fish flag flower flute forest fox friend frog garden gate giant glass glove goat guitar hammer harbor hat
hill honey horse hotel house island jacket judge jungle kettle king kitchen kite ladder lake lamp lantern leaf lemon
letter library lion lock machine map market meadow melon mirror monkey moon morning mountain mouse museum needle nest
night notebook nurse oak ocean office orchard oven owl painter palace paper park path pencil pepper piano picture
pilot pine planet plate pocket poet pond potato prince puzzle queen rabbit radio rain ribbon ring river road robin
rocket roof room rope rose sailor school sea shadow sheep ship shirt shoe singer sister sky snow soldier song spoon
spring star station stone storm story street student summer table tailor teacher temple tent theater ticket tiger
tower town train tree tunnel uncle valley village violin wagon wall watch water whale wheel window winter wolf wood
writer yard zebra
"""
VERBS_TEXT = """
admires answers asks avoids believes calls carries chooses copies draws fears feeds finds follows forgets greets
guards hears helps hides invites joins keeps knows leaves likes meets misses moves needs notices owns paints praises
remembers sees sells shows thanks visits wakes wants watches
"""
ADJECTIVES, NOUNS, VERBS = ADJECTIVES_TEXT.split(), NOUNS_TEXT.split(), VERBS_TEXT.split()


def pairs(draw: random.Random, count: int) -> list[str]:
    """So many different words such as "brave-river". Raises ValueError where there are not as many."""
    chosen = draw.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in chosen]


def sentence(draw: random.Random) -> str:
    """A sentence of nine words that means little: "The old king near the lake greets a small dog."."""
    first, second, place = draw.choice(NOUNS), draw.choice(NOUNS), draw.choice(NOUNS)
    adjectives = [draw.choice(ADJECTIVES) for _ in range(2)]
    where = draw.choice(("near", "behind", "beyond", "before"))
    end = "an" if adjectives[1][0] in "aeiou" else "a"
    return f"The {adjectives[0]} {first} {where} the {place} {draw.choice(VERBS)} {end} {adjectives[1]} {second}."
