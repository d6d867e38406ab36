"""Drawings for the gallery: what the CIFAR-10 network knows, drawn from scratch.

They are the project's own, so anybody may copy the figures; and what is object and what is
background is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 512  # drawn large and reduced by the network's own preprocessing

Colour = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw], None]


def airplane(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((60, 225, 450, 295), (235, 238, 242))
    draw.polygon([(390, 245), (470, 150), (495, 150), (455, 265)], (215, 220, 226))
    draw.polygon([(210, 265), (310, 265), (400, 400), (355, 400)], (190, 196, 205))
    draw.polygon([(230, 235), (300, 235), (355, 140), (320, 140)], (205, 210, 218))
    for x in range(130, 382, 28):
        draw.ellipse((x, 245, x + 12, 257), (60, 70, 90))
    draw.polygon([(62, 258), (95, 238), (110, 262)], (50, 60, 80))


def automobile(draw: ImageDraw.ImageDraw) -> None:
    body = [(40, 350), (48, 270), (140, 255), (195, 180), (350, 180), (410, 255), (475, 280)]
    draw.polygon([*body, (478, 350)], (190, 25, 25))
    draw.polygon([(160, 255), (205, 197), (265, 197), (265, 255)], (40, 55, 70))
    draw.polygon([(278, 255), (278, 197), (342, 197), (388, 255)], (40, 55, 70))
    draw.rectangle((40, 345, 478, 368), (40, 10, 10))
    _wheels(draw, 365, 50, 24, 135, 385)
    draw.ellipse((452, 285, 476, 310), (250, 240, 180))
    draw.rectangle((42, 285, 58, 310), (120, 0, 0))


def bird(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((150, 200, 360, 330), (120, 80, 50))
    draw.ellipse((100, 150, 200, 250), (130, 90, 55))
    draw.polygon([(105, 195), (40, 205), (108, 222)], (230, 170, 40))
    draw.ellipse((130, 180, 148, 198), (10, 10, 10))
    draw.polygon([(330, 240), (480, 200), (470, 270), (350, 290)], (90, 60, 40))
    draw.polygon([(210, 230), (330, 230), (390, 330), (260, 310)], (80, 52, 34))
    draw.ellipse((165, 250, 300, 325), (220, 200, 170))
    for x in (230, 270):
        draw.line((x, 325, x, 400), (60, 40, 20), 8)
    draw.rectangle((60, 398, 450, 415), (85, 60, 40))


def horse(draw: ImageDraw.ImageDraw) -> None:
    coat, hair = (110, 65, 35), (35, 22, 15)
    draw.ellipse((130, 190, 380, 310), coat)
    draw.polygon([(330, 230), (400, 90), (440, 110), (385, 270)], coat)
    draw.polygon([(395, 85), (480, 140), (470, 175), (420, 150)], coat)
    draw.polygon([(405, 90), (412, 60), (428, 92)], coat)
    draw.polygon([(395, 90), (380, 95), (325, 215), (345, 230)], hair)
    for x in (160, 200, 320, 360):
        draw.polygon([(x - 16, 280), (x + 16, 280), (x + 10, 430), (x - 8, 430)], (95, 55, 30))
    draw.polygon([(140, 210), (90, 240), (80, 350), (110, 340), (125, 260), (150, 250)], hair)


def ship(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(50, 270), (470, 270), (430, 365), (110, 365)], (150, 40, 35))
    draw.polygon([(50, 270), (470, 270), (462, 288), (62, 288)], (240, 240, 240))
    draw.rectangle((160, 200, 330, 270), (245, 245, 240))
    draw.rectangle((190, 150, 290, 200), (235, 235, 232))
    for x in range(172, 327, 31):
        draw.rectangle((x, 222, x + 18, 240), (60, 80, 110))
    draw.rectangle((215, 90, 262, 150), (30, 30, 35))
    draw.rectangle((215, 100, 262, 115), (200, 60, 40))
    draw.line((380, 270, 380, 120), (80, 80, 80), 7)


def truck(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((40, 140, 330, 370), (235, 235, 235))
    draw.rectangle((40, 140, 330, 160), (40, 70, 160))
    for x in range(80, 330, 50):
        draw.line((x, 165, x, 360), (205, 205, 208), 4)
    draw.polygon([(340, 210), (430, 210), (475, 285), (478, 370), (340, 370)], (35, 75, 170))
    draw.polygon([(360, 225), (422, 225), (452, 285), (360, 285)], (40, 50, 60))
    draw.rectangle((40, 368, 480, 388), (30, 30, 30))
    _wheels(draw, 389, 44, 18, 110, 200, 410)


def _wheels(draw: ImageDraw.ImageDraw, y: int, radius: int, hub: int, *centres: int) -> None:
    for x in centres:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), (20, 20, 22))
        draw.ellipse((x - hub, y - hub, x + hub, y + hub), (180, 182, 185))


# Subject: colours of the sky at its top and bottom, the ground's edge and colour.
_SCENES: dict[str, tuple[Draw, Colour, Colour, int, Colour]] = {
    "airplane": (airplane, (110, 160, 220), (200, 220, 240), SIDE, (0, 0, 0)),
    "automobile": (automobile, (200, 205, 210), (170, 175, 178), 330, (95, 95, 98)),
    "bird": (bird, (120, 170, 225), (190, 215, 240), SIDE, (0, 0, 0)),
    "horse": (horse, (170, 200, 230), (210, 220, 225), 350, (95, 135, 60)),
    "ship": (ship, (150, 185, 225), (215, 228, 240), 330, (38, 74, 110)),
    "truck": (truck, (190, 205, 225), (220, 225, 228), 370, (105, 103, 100)),
}
SUBJECTS = tuple(_SCENES)


def drawing(subject: str) -> Image.Image:
    """The drawing of one of `SUBJECTS`, RGB, 512 × 512."""
    figure, top, bottom, horizon, ground = _SCENES[subject]
    # A sky without any grain is nothing that the network has seen.
    grain = np.random.default_rng(SUBJECTS.index(subject)).normal(0, 6, (32, 32, 3))
    sky = np.linspace(top, bottom, 32)[:, None] + grain
    picture = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, horizon, SIDE, SIDE), ground)
    if subject == "ship":
        for wave in range(14):
            shade, y = 52 + 2 * wave, 340 + 12 * wave
            draw.line((0, y, SIDE, y), (shade, shade + 40, shade + 76), 3)
    figure(draw)
    return picture.filter(ImageFilter.GaussianBlur(2))
