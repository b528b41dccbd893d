"""The toy world: 32x32 pictures of coloured, filled shapes in scenes, drawn in several styles, with captions.

No files are read: every picture is drawn from a seed. The world has two uses:

1. `sample_factors`, `render` and `captions` give the endless (image, caption) pairs on which `pretrain.py` trains the
   toy CLIP. The captions are as noisy as the web's (synonyms, attributes left out or wrong, chatter around them), so
   that the toy CLIP's knowledge is broad but imperfect, as CLIP's is.
2. `TASKS` are the small classification tasks on which the methods are tried. `task_image(name, part, index)` gives the
   same picture in every process.

    python toyclip/world.py --png toyclip/world.png     draws every factor once
"""

from __future__ import annotations

import argparse
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# FACTORS: what a picture is made of, and the words for it (the first word of each row is the factor's name)
# ----------------------------------------------------------------------------------------------------------------------

SIZE = 32  # image side, pixels

# fmt: off
SHAPE_SYNONYMS = {
    "circle": ["disc", "ball"], "square": ["box"], "triangle": ["wedge"], "star": ["asterisk"],
    "heart": ["valentine"], "diamond": ["gem"], "cross": ["plus"], "ring": ["loop", "hoop"],
    "moon": ["crescent"], "arrow": ["pointer"], "flower": ["blossom"], "lightning": ["bolt"],
}
COLOR_SYNONYMS = {
    "red": ["crimson"], "orange": ["amber"], "yellow": ["gold"], "green": ["lime"], "blue": ["azure"],
    "purple": ["violet"], "pink": ["rose"], "white": ["pale"],
}
FILL_SYNONYMS = {"plain": ["solid"], "striped": ["banded"], "spotted": ["dotted"], "hollow": ["empty"]}
SCENE_PHRASES = {
    "grass": ["a lawn", "grass", "a meadow"], "water": ["water", "the sea", "a lake"],
    "sand": ["sand", "the beach", "a desert"], "snow": ["snow", "ice"], "brick": ["a brick wall", "bricks"],
    "night": ["the night sky", "a dark night"], "wood": ["wood", "a wooden table"], "sky": ["the sky", "clouds"],
}
STYLE_PHRASES = {
    "photo": ["photo", "picture", "image"], "sketch": ["sketch", "drawing", "line drawing"],
    "negative": ["negative", "inverted photo"], "grainy": ["grainy photo", "noisy image"],
    "painting": ["painting", "artwork"], "dark": ["dark photo", "dim picture"],
}
HSV = {  # hue, saturation and value of each colour before its jitter, all in [0, 1]
    "red": (0.0, 0.85, 0.85), "orange": (0.075, 0.9, 0.92), "yellow": (0.155, 0.85, 0.95), "green": (0.34, 0.8, 0.65),
    "blue": (0.61, 0.85, 0.85), "purple": (0.76, 0.65, 0.65), "pink": (0.92, 0.45, 0.97), "white": (0.0, 0.0, 0.95),
}
# fmt: on
SHAPES, COLORS, FILLS = list(SHAPE_SYNONYMS), list(COLOR_SYNONYMS), list(FILL_SYNONYMS)
SCENES, STYLES = list(SCENE_PHRASES), list(STYLE_PHRASES)
NAMES = {"shape": SHAPES, "color": COLORS, "fill": FILLS, "scene": SCENES, "style": STYLES}


def sample_factors(n, generator, **fixed):
    """Draw the factors of n pictures: a dict of tensors [n] on the generator's device.

    Any factor can be fixed: to a name, a number or a tensor [n], or to a pair (low, high) to draw it uniformly between.
    """
    device = generator.device

    def choose(k):
        return torch.randint(0, k, (n,), generator=generator, device=device)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, device=device)

    factors = {name: choose(len(NAMES[name])) for name in ("shape", "color", "fill", "scene")}
    # Half of all pictures are photos (45 % and a sixth of the rest); each other style is 9 %: known, but less well.
    is_photo = uniform(0, 1) < 0.45
    factors["style"] = choose(len(STYLES)).masked_fill(is_photo, STYLES.index("photo"))
    factors["scale"] = uniform(
        0.28, 0.46
    )  # size of the object: about half its width, as a share of the image's side
    factors["angle"] = uniform(-0.5, 0.5)  # rotation, radians
    factors["x"], factors["y"] = (
        uniform(-1, 1),
        uniform(-1, 1),
    )  # -1 and 1: as near to the image's edge as it goes
    factors["flip"] = choose(2)
    for name, value in fixed.items():
        if isinstance(value, tuple):
            factors[name] = uniform(*value)
        else:
            value = NAMES[name].index(value) if isinstance(value, str) else value
            factors[name] = torch.as_tensor(value, device=device).expand(n)
    return factors


# ----------------------------------------------------------------------------------------------------------------------
# SHAPES: one large mask for each, drawn once with numpy
# ----------------------------------------------------------------------------------------------------------------------

MASK_SIZE, MASK_RANGE = (
    96,
    1.3,
)  # a mask is 96x96 and covers [-1.3, 1.3] in both directions; shapes have a radius of ~1


def polygon(points, x, y):
    """Say which of the coordinates lie inside the polygon: those whose ray to the right crosses its edges an odd number
    of times."""
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0)):
        crosses = ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1 + 1e-12) + x1)
        inside ^= crosses
    return inside


def shape_mask(shape, x, y):
    """Say which of the coordinates belong to the shape (y points down)."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius < 0.9
    if shape == "square":
        return (abs(x) < 0.8) & (abs(y) < 0.8)
    if shape == "triangle":
        return polygon([(0, -1), (0.95, 0.75), (-0.95, 0.75)], x, y)
    if shape == "star":
        turn = -math.pi / 2 + math.pi * np.arange(10) / 5
        tips = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        return polygon(np.stack([tips * np.cos(turn), tips * np.sin(turn)], 1), x, y)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 80, endpoint=False)
        height = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return polygon(np.stack([np.sin(t) ** 3, -height], 1), x, y)
    if shape == "diamond":
        return polygon([(0, -1.1), (0.65, 0), (0, 1.1), (-0.65, 0)], x, y)
    if shape == "cross":
        return ((abs(x) < 0.32) & (abs(y) < 1)) | ((abs(y) < 0.32) & (abs(x) < 1))
    if shape == "ring":
        return (radius < 1) & (radius > 0.55)
    if shape == "moon":
        return (radius < 1) & (np.hypot(x - 0.55, y) > 0.85)
    if shape == "arrow":
        return polygon(
            [
                (1.1, 0),
                (0.2, -0.8),
                (0.2, -0.3),
                (-1.05, -0.3),
                (-1.05, 0.3),
                (0.2, 0.3),
                (0.2, 0.8),
            ],
            x,
            y,
        )
    if shape == "flower":
        return radius < 0.72 + 0.32 * np.cos(5 * np.arctan2(y, x))
    if shape == "lightning":
        return polygon(
            [(0.25, -1.15), (-0.65, 0.15), (-0.1, 0.15), (-0.3, 1.15), (0.65, -0.25), (0.1, -0.25)],
            x,
            y,
        )
    raise ValueError(f"no shape is called {shape}")


@lru_cache
def shape_masks(device):
    """Silhouette, inside (what a hollow shape leaves out) and outline of every shape, softened: [12, 3, 96, 96]."""
    axis = ((np.arange(MASK_SIZE) + 0.5) / MASK_SIZE * 2 - 1) * MASK_RANGE
    x, y = np.meshgrid(axis, axis)
    whole = torch.tensor(np.stack([shape_mask(shape, x, y) for shape in SHAPES])).float()[:, None]
    inside = -F.max_pool2d(
        -whole, 15, 1, 7
    )  # minus the maximum of the negative: a minimum, which erodes the shape
    outline = whole + F.max_pool2d(-whole, 7, 1, 3)
    soft = [F.avg_pool2d(mask, k, 1, k // 2) for mask, k in ((whole, 5), (inside, 5), (outline, 3))]
    return torch.cat(soft, 1).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# RENDERING: factors -> uint8 pictures
# ----------------------------------------------------------------------------------------------------------------------


class Draw:
    """Random ingredients for n pictures, each from fresh numbers of the generator; every result broadcasts with
    [n, 3, 32, 32]."""

    def __init__(self, n, generator):
        self.n, self.generator, self.device = n, generator, generator.device
        self.y = torch.linspace(0, 1, SIZE, device=self.device).view(1, 1, SIZE, 1)
        self.x = self.y.transpose(2, 3)

    def uniform(self, low, high):
        return low + (high - low) * torch.rand(
            self.n, 1, 1, 1, generator=self.generator, device=self.device
        )

    def pixels(self):
        return torch.rand(self.n, 1, SIZE, SIZE, generator=self.generator, device=self.device)

    def gauss(self, *shape):
        return torch.randn(self.n, *shape, generator=self.generator, device=self.device)

    def blobs(self, k, channels=1):
        """Smooth noise in [0, 1]: a k by k grid of random numbers, interpolated."""
        grid = torch.rand(self.n, channels, k, k, generator=self.generator, device=self.device)
        return F.interpolate(grid, size=(SIZE, SIZE), mode="bilinear", align_corners=False)

    def color(self, hue, saturation, value):
        return hsv_to_rgb(self.uniform(*hue), self.uniform(*saturation), self.uniform(*value))


def hsv_to_rgb(hue, saturation, value):
    """[n, 1, 1, 1] each -> [n, 3, 1, 1]; the hue wraps around."""
    sector = (hue * 6 + torch.tensor([5.0, 3.0, 1.0], device=hue.device).view(1, 3, 1, 1)) % 6
    return value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1)


def wave(cycles):
    return torch.sin(2 * math.pi * cycles)


def paint_scene(scene, draw):
    """Draw n backgrounds of one scene: [n, 3, 32, 32]."""
    x, y, uniform = draw.x, draw.y, draw.uniform
    if scene == "grass":
        blades = F.avg_pool2d(draw.pixels(), (5, 1), 1, (2, 0))
        return draw.color((0.25, 0.38), (0.5, 0.8), (0.45, 0.7)) * (
            0.65 + 0.5 * blades + 0.2 * draw.blobs(4)
        )
    if scene == "water":
        swell = 0.25 * wave(x * uniform(1, 2) + uniform(0, 1))
        ripples = wave(uniform(3, 5) * y + swell + uniform(0, 1))
        return draw.color((0.53, 0.63), (0.5, 0.8), (0.55, 0.85)) * (0.85 + 0.2 * ripples)
    if scene == "sand":
        grains = (0.8 + 0.3 * draw.pixels()) * (0.9 + 0.2 * draw.blobs(4))
        return draw.color((0.08, 0.13), (0.3, 0.55), (0.75, 0.95)) * grains
    if scene == "snow":
        return draw.color((0.55, 0.62), (0.03, 0.15), (0.9, 1.0)) - 0.15 * draw.blobs(5)
    if scene == "brick":
        rows = uniform(4, 6)
        row = y * rows + uniform(0, 1)
        column = (
            x * rows * 0.6 + (row.floor() % 2) * 0.5 + uniform(0, 1)
        )  # every other row is shifted by half a brick
        mortar = ((row % 1 < 0.2) | (column % 1 < 0.12)).float()
        clay = draw.color((0.0, 0.05), (0.5, 0.7), (0.45, 0.7)) * (0.85 + 0.25 * draw.pixels())
        return clay * (1 - mortar) + 0.62 * mortar
    if scene == "night":
        stars = (draw.pixels() > 0.98).float()
        return (
            draw.color((0.6, 0.75), (0.4, 0.8), (0.08, 0.25)) * (0.8 + 0.4 * draw.blobs(3))
            + 0.5 * stars
        )
    if scene == "wood":
        veins = wave(x * uniform(3, 6) + 0.6 * draw.blobs(4) + uniform(0, 1))
        return draw.color((0.06, 0.1), (0.5, 0.7), (0.4, 0.65)) * (0.8 + 0.25 * veins)
    if scene == "sky":
        haze = 0.25 * (draw.blobs(5) - 0.5).clamp(min=0) - 0.1 * draw.blobs(4)
        return (1 - y) * draw.color((0.55, 0.6), (0.4, 0.65), (0.85, 1.0)) + 0.95 * y + haze
    raise ValueError(f"no scene is called {scene}")


def apply_style(style, image, draw):
    """Redraw finished pictures [n, 3, 32, 32] with values in [0, 1] in one style."""
    if style == "photo":
        return image
    if style == "sketch":  # dark lines where the brightness changes
        grey = image.mean(1, keepdim=True)
        grey = 0.5 * grey + 0.5 * F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
        grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")
        across = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
        down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
        return (1 - 1.6 * (across**2 + down**2).sqrt()).clamp(0, 1).expand_as(image)
    if style == "negative":
        return 1 - image
    if style == "grainy":
        return image + 0.17 * draw.gauss(3, SIZE, SIZE)
    if style == "painting":  # blurred, then few levels of each colour, with borders that wander
        image = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return (3.3 * image + 0.5 * (draw.blobs(8, channels=3) - 0.5)).round() / 3.3
    if style == "dark":
        return image * draw.uniform(0.2, 0.35)
    raise ValueError(f"no style is called {style}")


def place_shapes(factors):
    """Scale, rotate, flip and shift the shapes' masks: masks [n, 3, 32, 32] and the object's own x, y [n, 1, 32, 32].

    affine_grid wants the inverse map, from the picture's coordinates (in [-1, 1]) to the mask's.
    """
    scale, cos, sin = factors["scale"], torch.cos(factors["angle"]), torch.sin(factors["angle"])
    room = 0.9 * (1 - 2 * scale).clamp(min=0)
    x, y = factors["x"] * room, factors["y"] * room
    zoom = 1.15 / (2 * scale * MASK_RANGE)
    mirror = 1 - 2 * factors["flip"].float()
    to_mask_x = torch.stack([cos, sin, -(cos * x + sin * y)], 1) * (zoom * mirror)[:, None]
    to_mask_y = torch.stack([-sin, cos, sin * x - cos * y], 1) * zoom[:, None]
    grid = F.affine_grid(
        torch.stack([to_mask_x, to_mask_y], 1), (len(scale), 1, SIZE, SIZE), align_corners=False
    )
    masks = F.grid_sample(shape_masks(scale.device)[factors["shape"]], grid, align_corners=False)
    return masks, MASK_RANGE * grid[..., 0][:, None], MASK_RANGE * grid[..., 1][:, None]


def render(factors, generator):
    """Draw the pictures that the factors describe: uint8 [n, 3, 32, 32] on the generator's device, which must also be
    that of the factors. Everything the factors leave open (phases, shades, noise) comes from the generator."""
    n = len(factors["shape"])
    draw = Draw(n, generator)

    image = torch.empty(n, 3, SIZE, SIZE, device=generator.device)
    for index, scene in enumerate(SCENES):
        rows = (factors["scene"] == index).nonzero()[:, 0]
        if len(rows):
            image[rows] = paint_scene(scene, Draw(len(rows), generator))

    # The object's two tones: its jittered colour, and a darker or lighter one for stripes and spots.
    hsv = torch.tensor([HSV[color] for color in COLORS], device=generator.device)[factors["color"]]
    hue, saturation, value = hsv.view(n, 3, 1, 1, 1).unbind(1)
    saturation = (saturation * draw.uniform(0.7, 1.1)).clamp(0, 1)
    value = (value * draw.uniform(0.75, 1.08)).clamp(0, 1)
    tone = hsv_to_rgb(hue + 0.022 * draw.gauss(1, 1, 1), saturation, value)
    second = torch.where(draw.uniform(0, 1) < 0.5, 0.35 * tone, 1 - 0.3 * (1 - tone))
    second = torch.where(
        tone.mean(1, keepdim=True) > 0.8, 0.4 * tone, second
    )  # nothing is lighter than white

    masks, x, y = place_shapes(factors)
    whole, inside, outline = masks.split(1, 1)
    is_striped, is_spotted, is_hollow = (
        (factors["fill"] == FILLS.index(fill)).float().view(n, 1, 1, 1)
        for fill in ("striped", "spotted", "hollow")
    )
    cycles, phase = draw.uniform(1.3, 1.9), draw.uniform(0, 1)
    across, down = 2 * math.pi * (cycles * x + phase), 2 * math.pi * (cycles * y + phase)
    stripes = torch.sigmoid(4 * torch.sin(across))
    spots = torch.sigmoid(8 * (torch.cos(across) * torch.cos(down) - 0.25))
    pattern = is_striped * stripes + is_spotted * spots  # share of the second tone
    paint = (tone + (second - tone) * pattern) * (1 - 0.8 * outline)  # a dark outline
    cover = whole * (1 - is_hollow * inside)
    image = image + (paint - image) * cover

    slope_x, slope_y = 2 * draw.x - 1, 2 * draw.y - 1
    light = (
        draw.uniform(0.85, 1.1)
        + draw.uniform(-0.12, 0.12) * slope_x
        + draw.uniform(-0.12, 0.12) * slope_y
    )
    image = (image * light).clamp(0, 1)

    for index, style in enumerate(STYLES):
        rows = (factors["style"] == index).nonzero()[:, 0]
        if len(rows) and style != "photo":
            image[rows] = apply_style(style, image[rows], Draw(len(rows), generator))
    image = image + 0.025 * draw.gauss(3, SIZE, SIZE)  # every camera has some noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# CAPTIONS
# ----------------------------------------------------------------------------------------------------------------------

# Sentence patterns with their shares. {place}: "" or, say, " on grass".
PATTERNS = {
    "{a_medium} of {an_object}{place}.": 0.55,
    "{object}{place}": 0.10,
    "{an_object}{place}.": 0.10,
    "{medium} of the {object}{place}": 0.10,
    "{object}{place}, {medium}.": 0.08,
    "there is {an_object}{place} in this {medium}.": 0.07,
}
PREPOSITIONS = ["on", "in front of", "with"]
VAGUE_NOUNS = ["thing", "object", "shape"]
CHATTER = [
    "my favourite one", "taken last summer", "click to see more", "image number 7", "best price online",
    "from my trip", "i like this one", "found in the archive", "daily post", "free download", "look at this",
    "new arrival", "high quality stock", "a close view", "number 42", "uploaded by a friend", "part of a series",
    "nice shot", "our collection", "good example",
]  # fmt: skip
CHATTER_ENDS = [",", ":", " -", ""]


def with_article(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# The caption patterns with {} for the class, about a scene not mentioned: the toy's "ensemble" of templates.
CAPTION_TEMPLATES = [
    pattern.format(
        a_medium=with_article(medium), medium=medium, an_object="a {}", object="{}", place=""
    )
    for medium in sum(STYLE_PHRASES.values(), [])
    for pattern in PATTERNS
]
CAPTION_TEMPLATES = list(
    dict.fromkeys(CAPTION_TEMPLATES)
)  # each once: some patterns name no medium


def vocabulary():
    """Every piece of text that captions are put together from; their words are all that the toy CLIP ever reads."""
    tables = (SHAPE_SYNONYMS, COLOR_SYNONYMS, FILL_SYNONYMS, SCENE_PHRASES, STYLE_PHRASES)
    pieces = [
        text for table in tables for name, others in table.items() for text in (name, *others)
    ]
    sentences = [template.format("") for template in CAPTION_TEMPLATES]
    return (
        pieces
        + sentences
        + PREPOSITIONS
        + VAGUE_NOUNS
        + CHATTER
        + CHATTER_ENDS
        + ["a", "an", "big", "small"]
    )


def caption(factors, big, rng, wrong):
    """Describe one picture as the web would: some of it, in varying words, and now and then falsely.

    factors: the indices of shape, color, fill, scene and style; rng: a random.Random; wrong: how often each is a guess.
    """
    shape, color, fill, scene, style = (
        rng.choice(names) if rng.random() < wrong else names[index]
        for names, index in zip(NAMES.values(), factors)
    )
    words = []
    if rng.random() < 0.15:
        words.append("big" if big else "small")
    # Nobody names the colour of a line drawing, and a negative has another one.
    if rng.random() < (0.05 if style in ("sketch", "negative") else 0.5):
        words.append(rng.choice(COLOR_SYNONYMS[color]) if rng.random() < 0.2 else color)
    if rng.random() < (0.3 if fill == "plain" else 0.6):
        words.append(rng.choice(FILL_SYNONYMS[fill]) if rng.random() < 0.2 else fill)
    if rng.random() < 0.06:
        words.append(rng.choice(VAGUE_NOUNS))
    else:
        words.append(rng.choice(SHAPE_SYNONYMS[shape]) if rng.random() < 0.25 else shape)
    thing = " ".join(words)
    medium = rng.choice(STYLE_PHRASES[style if rng.random() < 0.7 else "photo"])
    place = ""
    if rng.random() < 0.35:
        place = f" {rng.choice(PREPOSITIONS)} {rng.choice(SCENE_PHRASES[scene])}"
    pattern = rng.choices(list(PATTERNS), weights=PATTERNS.values())[0]
    text = pattern.format(
        a_medium=with_article(medium),
        medium=medium,
        an_object=with_article(thing),
        object=thing,
        place=place,
    )
    # Chatter before the description makes captions long, which trains the text tower's later positions: a learned
    # prompt of 16 tokens in front of a class name needs them.
    if rng.random() < 0.35:
        chatter = [
            rng.choice(CHATTER) + rng.choice(CHATTER_ENDS) for _ in range(rng.choice([1, 1, 2, 3]))
        ]
        text = " ".join([*chatter, text])
    if rng.random() < 0.12:
        text = f"{text} {rng.choice(CHATTER)}"
    return text


def captions(factors, rng, wrong=0.05):
    """Describe n pictures: a list of n texts. rng is a random.Random."""
    columns = [factors[name].tolist() for name in NAMES]
    big = (factors["scale"] > 0.37).tolist()
    return [caption(row, is_big, rng, wrong) for row, is_big in zip(zip(*columns), big)]


# ----------------------------------------------------------------------------------------------------------------------
# TASKS: a list of classes (some factors, by name) in a domain (the other factors, within limits)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyTask:
    classnames: list[str]
    template: str
    parts: dict[str, int]  # images a class
    classes: list[dict[str, int]]  # the factors that make an image one of the class, as indices
    domain: (
        dict  # the factors that are fixed or limited for every image, as sample_factors takes them
    )


def class_list(pattern, **factors):
    """Every combination of the given factors, the first one slowest, so that the base classes (the first half) and the
    new ones have none of its values in common: [("red circle", {"shape": 0, "color": 0}), ...]."""
    rows = [dict(zip(factors, values)) for values in product(*factors.values())]
    return [
        (pattern.format(**row), {key: NAMES[key].index(value) for key, value in row.items()})
        for row in rows
    ]


PRIMARY = ["red", "yellow", "blue"]
PATTERNED = ["striped", "spotted", "hollow"]
KINDS = {
    "shapes": class_list("{shape}", shape=SHAPES),
    "synonyms": [
        (SHAPE_SYNONYMS[shape][-1], fixed) for shape, fixed in class_list("{shape}", shape=SHAPES)
    ],
    "fillshapes": class_list("{fill} {shape}", shape=SHAPES[:8], fill=PATTERNED),
    "colorfills": class_list("{color} {fill} object", color=COLORS, fill=PATTERNED),
    "colorshapes": class_list("{color} {shape}", shape=SHAPES[:8], color=PRIMARY),
    "sceneshapes": class_list(
        "{shape} on {scene}", shape=SHAPES[:6], scene=["grass", "water", "sand", "wood"]
    ),
}
SMALL, TURNED = (
    (0.26, 0.34),
    (0.6, 1.2),
)  # sizes at the lower end of pretraining's, angles (radians) beyond its end


def make_task(kind, domain, **more_parts):
    classnames, classes = zip(*KINDS[kind])
    parts = {"train": 64, "val": 60, "test": 60} | more_parts
    return ToyTask(list(classnames), "a photo of a {}.", parts, list(classes), domain)


# Chosen once the weights were final and before any method was run, by zero-shot accuracy on the val part alone: 45 to
# 85 %, and six kinds of gap between what the CLIP was trained on and the task. Changing a name changes its images.
TASKS = {
    "toy_shapes_grainysmall": make_task("shapes", {"style": "grainy", "scale": SMALL}),  # noise
    "toy_synonyms_paintingsmall": make_task(
        "synonyms", {"style": "painting", "scale": SMALL}
    ),  # odd class names
    "toy_fillshapes_sketch": make_task("fillshapes", {"style": "sketch"}),  # a rare style
    "toy_colorfills_dark": make_task(
        "colorfills", {"style": "dark"}
    ),  # bad light; attributes, not things
    "toy_colorshapes_rotated": make_task(
        "colorshapes", {"style": "photo", "angle": TURNED}
    ),  # never seen turned so far
    "toy_sceneshapes_grainyrotated": make_task(
        "sceneshapes", {"style": "grainy", "angle": TURNED}
    ),  # several at once
}
# Every class has its own scene, with the probability given here: a shortcut that the two out-of-distribution parts take
# away. With 1/8 scene and class are independent: the same images, but for their scenes.
BIASED = "toy_shapes_biased"
SHORTCUT = {BIASED: 0.95, "toy_shapes_unbiased": 1 / len(SCENES)}
TASKS |= dict.fromkeys(
    SHORTCUT,
    make_task(
        "shapes", {"style": "grainy", "scale": SMALL}, train=40, val=40, background=60, style=60
    ),
)
BLOCK = 60  # images are drawn this many at a time, whoever asks for which: so an index always means the same image


def task_labels(name, part):
    """The label of every image of the part."""
    n_classes = len(TASKS[name].classnames)
    return [index % n_classes for index in range(TASKS[name].parts[part] * n_classes)]


def task_items(name):
    """Class names; {(part, domain): [(address, label), ..]}, with the domain "" in distribution."""
    sets = {}
    for part in TASKS[name].parts:
        key = (part, "") if part in ("train", "val", "test") else ("test", part)
        labels = enumerate(task_labels(name, part))
        sets[key] = [(f"toy:{name}/{part}/{i}", label) for i, label in labels]
    return TASKS[name].classnames, sets


def item_image(address):
    """The image at such an address: uint8 [32, 32, 3]."""
    name, part, index = address.removeprefix("toy:").split("/")
    return task_image(name, part, int(index))


def hidden_shortcut(labels, part, bias, generator):
    """The scene, and in part "style" the style, of toy_shapes_biased: class k's own scene is k mod 8; in train, val and
    test it has it with probability `bias` and else one of the other seven, in the other parts always one of those."""
    n = len(labels)
    own = labels % len(SCENES)
    other = (own + torch.randint(1, len(SCENES), (n,), generator=generator)) % len(SCENES)
    has_own = torch.rand(n, generator=generator) < (
        bias if part in ("train", "val", "test") else 0.0
    )
    fixed = {"scene": torch.where(has_own, own, other)}
    if part == "style":
        styles = torch.tensor(
            [STYLES.index(style) for style in ("photo", "sketch", "painting", "dark")]
        )
        fixed["style"] = styles[torch.randint(0, 4, (n,), generator=generator)]
    return fixed


@lru_cache(maxsize=512)  # 184 kB each
@torch.autocast("cpu", enabled=False)  # whoever reads images within a bf16 run gets the same ones
def task_block(name, part, block):
    """Images block * BLOCK and following of the part: (uint8 [60, 32, 32, 3], their factors)."""
    task = TASKS[name]
    seed = hashlib.sha256(
        f"{BIASED if name in SHORTCUT else name}/{part}/{block}".encode()
    ).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
    labels = torch.arange(block * BLOCK, (block + 1) * BLOCK) % len(task.classes)
    fixed = task.domain | {
        key: torch.tensor([row[key] for row in task.classes])[labels] for key in task.classes[0]
    }
    if name in SHORTCUT:
        fixed |= hidden_shortcut(labels, part, SHORTCUT[name], generator)
    factors = sample_factors(BLOCK, generator, **fixed)
    return render(factors, generator).permute(0, 2, 3, 1).contiguous().numpy(), factors


def task_images(name, part, indices):
    """The images with these indices: uint8 [n, 32, 32, 3]."""
    n_images = TASKS[name].parts[part] * len(TASKS[name].classnames)
    if any(not 0 <= index < n_images for index in indices):
        raise IndexError(f"{name}/{part} has images 0 to {n_images - 1}")
    images = [task_block(name, part, index // BLOCK)[0][index % BLOCK] for index in indices]
    return np.stack(images) if images else np.empty((0, SIZE, SIZE, 3), np.uint8)


def task_image(name, part, index):
    """One image: uint8 [32, 32, 3]."""
    return task_images(name, part, [index])[0]


# ----------------------------------------------------------------------------------------------------------------------
# THE PICTURE OF THE WORLD
# ----------------------------------------------------------------------------------------------------------------------


def draw_world(path, zoom=3, seed=0):
    """Write a labelled picture of every shape, colour, fill, scene and style."""
    from PIL import Image, ImageDraw, ImageFont

    calm = {"shape": "star", "style": "photo", "fill": "plain", "scene": "snow", "flip": 0}
    calm |= {"scale": 0.4, "angle": 0.2, "x": 0.0, "y": 0.0}
    rows = [  # for each row of the picture: the factor that varies, and the values of others
        [("shape", {"color": torch.arange(len(SHAPES)) % len(COLORS)})],
        [("color", {}), ("fill", {"color": "orange"})],
        [("scene", {"shape": "heart", "color": "red"})],
        [
            ("style", {"color": "yellow", "scene": "water"}),
            ("style", {"shape": "arrow", "color": "red", "scene": "wood"}),
        ],
    ]
    tile, width, height = (
        SIZE * zoom,
        SIZE * zoom + 6,
        SIZE * zoom + 30,
    )  # a picture; the same with margin and label
    canvas = Image.new("RGB", (12 * width, len(rows) * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for row, groups in enumerate(rows):
        x, y = 0, row * height
        for factor, fixed in groups:
            names, generator = NAMES[factor], torch.Generator().manual_seed(seed)
            factors = sample_factors(
                len(names), generator, **(calm | fixed | {factor: torch.arange(len(names))})
            )
            for name, image in zip(names, render(factors, generator).permute(0, 2, 3, 1).numpy()):
                canvas.paste(
                    Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST), (x, y)
                )
                pen.text((x + tile / 2, y + tile + 2), name, "black", font, anchor="ma")
                x += width
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw every factor of the toy world.")
    parser.add_argument("--png", default="toyclip/world.png", help="file to write")
    draw_world(parser.parse_args().png)
