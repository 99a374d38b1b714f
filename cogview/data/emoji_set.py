"""`cogview prepare emoji`: the system's colour-emoji font as captioned pictures.

    OUT/images/1f469-1f3fd-200d-1f692.png   one picture each, named after its code points
    OUT/captions.jsonl                      path, captions, `held_out`, and the attributes
    OUT/about.json                          font, versions, counts and the rule of what is held out

An emoji of a person is a combination of a base (firefighter), a gender (woman) and a skin tone
(medium); of a couple, of two genders and two tones. A tenth of the combinations with a skin tone is
held out, by a hash of the code points. The others of the same base are for training, and so are all
emoji without a skin tone: training sees each base, with each of its genders, and each tone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from cogview.data.sources import optional_package
from cogview.files import atomic_write

HELD_OUT_RULE = (
    "An emoji with a skin tone is held out if the CRC-32 of its code points, in hexadecimal and "
    "joined by '-' as in its file name, is a multiple of 10."
)
TONES = {
    chr(0x1F3FB + i): name
    for i, name in enumerate(("light", "medium-light", "medium", "medium-dark", "dark"))
}
FONT_SIZES = (109, 136, 160, 128, 96, 72, 64)  # a font of bitmaps opens at its own size only

_JOINER, _PICTURE = "\u200d", "\ufe0f"
_PERSON = "\U0001f9d1"
_GENDERS = {"\U0001f468": "man", "\U0001f469": "woman", _PERSON: "person"}
_SIGNS = {"\u2642": "man", "\u2640": "woman"}
# Characters that stand for a sequence.
_SPELLED = {
    "👫": "👩\u200d🤝\u200d👨",
    "👬": "👨\u200d🤝\u200d👨",
    "👭": "👩\u200d🤝\u200d👩",
    "💏": "🧑\u200d❤\u200d💋\u200d🧑",
    "💑": "🧑\u200d❤\u200d🧑",
}
# Characters with a gender, and the base that they share.
_GENDERED = {
    "👴": ("🧓", "man"),
    "👵": ("🧓", "woman"),
    "👦": ("🧒", "man"),
    "👧": ("🧒", "woman"),
    "🤴": ("🫅", "man"),
    "👸": ("🫅", "woman"),
    "🎅": ("🧑\u200d🎄", "man"),
    "🤶": ("🧑\u200d🎄", "woman"),
    "🫃": ("🫄", "man"),
    "🤰": ("🫄", "woman"),
}


@dataclass(frozen=True)
class Attributes:
    """What an emoji is a combination of.

    Attributes:
        base: code points in hexadecimal, without gender and skin tone.
        gender: `woman`, `man` or `person` where it says one; of several persons joined by commas.
        skin_tone: `light` to `dark` where it has one; of two persons joined by a comma.
    """

    base: str
    gender: str
    skin_tone: str


def is_held_out(emoji: str) -> bool:
    """Whether an emoji is kept from training: `HELD_OUT_RULE`."""
    return any(tone in emoji for tone in TONES) and zlib.crc32(_hex(emoji).encode()) % 10 == 0


def attributes_of(emoji: str) -> Attributes:
    """The combination that an emoji shows; of its code points alone."""
    tones = [TONES[character] for character in emoji if character in TONES]
    plain = "".join(c for c in emoji if c not in TONES and c != _PICTURE)
    plain = "🤝" if plain == "🫱\u200d🫲" else _SPELLED.get(plain, plain)
    parts = plain.split(_JOINER)
    genders: list[str] = []
    if len(parts) > 1:
        genders = [_SIGNS[part] for part in parts if part in _SIGNS]
        parts = [part for part in parts if part not in _SIGNS]
    for index, part in enumerate(parts):
        if part in _GENDERED:
            parts[index], gender = _GENDERED[part]
            genders.append(gender)
        elif part in _GENDERS:
            parts[index] = _PERSON
            genders.append(_GENDERS[part])
    if len(genders) > 1 and len(tones) == 1:
        tones *= len(genders)  # one tone is that of both
    return Attributes(_hex(_JOINER.join(parts)), ", ".join(genders), ", ".join(tones))


def find_font() -> Path:
    """The system's colour-emoji font.

    Raises:
        FileNotFoundError: fontconfig finds none.
    """
    advice = "install one (Debian: apt-get install fonts-noto-color-emoji), or name it with --font"
    if shutil.which("fc-match") is None:
        raise FileNotFoundError(f"font: fontconfig (fc-match) is not installed; {advice}")
    command = ["fc-match", "-f", "%{color} %{file}", ":lang=und-zsye:color=true"]
    color, _, file = subprocess.run(command, capture_output=True, text=True).stdout.partition(" ")
    if color != "True":
        raise FileNotFoundError(f"font: this system has no colour-emoji font; {advice}")
    return Path(file)


class EmojiFont:
    """Draws emoji.

    Args:
        path: a font with colour bitmaps (Noto, Apple) or layers (COLRv0).

    Raises:
        FileNotFoundError, ValueError: no such file, not a font, or one that Pillow cannot draw.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(2, "--font: no such file", str(path))
        if not features.check("raqm"):
            raise ValueError("font: this Pillow lacks raqm, which joins emoji; install its wheel")
        self.path = path
        for size in FONT_SIZES:
            try:
                self.font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.RAQM)
                break
            except OSError as error:  # "invalid pixel size", or not a font
                problem = error
        else:
            raise ValueError(f"{path}: expected a font with colour emoji ({problem})")
        self.advance = self.font.getlength("😀")
        picture = self.draw("😀", 64)
        if picture is None or _is_grey(picture):
            raise ValueError(
                f"{path}: expected a font with colour emoji, as bitmaps or COLRv0 layers, that "
                "Pillow can draw"
            )

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def draw(self, emoji: str, size: int) -> Image.Image | None:
        """(size, size) RGB on white; None if the font does not have it as one picture."""
        left, top, right, bottom = self.font.getbbox(emoji)
        width, height = round(right - left), round(bottom - top)
        if self.font.getlength(emoji) != self.advance or not width or not height:
            return None
        side = max(width, height)
        canvas = Image.new("RGBA", (side, side), "white")
        place = ((side - width) // 2 - left, (side - height) // 2 - top)
        ImageDraw.Draw(canvas).text(place, emoji, font=self.font, embedded_color=True)
        picture = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        return picture if len(set(picture.tobytes())) > 1 else None


def prepare_emoji(
    out: Path,
    font_path: Path | None = None,
    languages: Sequence[str] = ("en",),
    size: int = 64,
    limit: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Draws all emoji that the font has; the same font and settings give the same files.

    Args:
        out: the folder; an earlier set in it is replaced.
        font_path: the font; None: the system's.
        languages: codes such as `en`, `zh`; an emoji gets a caption in each.
        size: side of the pictures in pixels.
        limit: only about this many, spread over all; 0: all.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        the content of `about.json`.

    Raises:
        FileNotFoundError: there is no font.
        ModuleNotFoundError: the package `emoji` is not installed.
        ValueError: an unknown language, a size below 8, a font without colour emoji, or a folder
            with other data.
    """
    package = optional_package("emoji")
    if unknown := [code for code in languages if code not in package.LANGUAGES]:
        raise ValueError(
            f"--languages: expected some of {' '.join(package.LANGUAGES)}, got {' '.join(unknown)}"
        )
    if not languages or size < 8 or limit < 0:
        raise ValueError(
            "expected at least one language, a size of 8 or more and a limit of 0 or more, got "
            f"--languages {' '.join(languages)} --size {size} --limit {limit}"
        )
    captions, about_path = out / "captions.jsonl", out / "about.json"
    if out.exists() and any(out.iterdir()) and not about_path.is_file():
        raise ValueError(f"--out: {out} holds other data; choose an empty or a new folder")
    font = EmojiFont(font_path or find_font())
    for language in languages:
        package.config.load_language(language)
    all_emoji = [
        emoji
        for emoji, data in package.EMOJI_DATA.items()
        if data["status"] == package.STATUS["fully_qualified"]
    ]
    bases = _base_names(all_emoji, package.EMOJI_DATA)
    gendered = {found.base for found in map(attributes_of, all_emoji) if found.gender}
    chosen = all_emoji[:: max(1, len(all_emoji) // limit)] if limit else all_emoji

    (out / "images").mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "name": "emoji",
        "font": f"{font.font.getname()[0]} ({font.path.name})",
        "font_sha256": font.sha256,
        "names": f"emoji {package.__version__}",
        "languages": list(languages),
        "size": size,
        "held_out_rule": HELD_OUT_RULE,
    }
    with atomic_write(about_path) as temporary:  # the folder is ours from here on
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    captions.unlink(missing_ok=True)
    for path in (out / "images").glob("*.png"):
        path.unlink()

    @functools.lru_cache(maxsize=64)  # the tones of an emoji are neighbours
    def without_tone(emoji: str) -> Image.Image | None:
        return font.draw(emoji, size)

    rows, missing, alike = [], [], []
    bar = tqdm(chosen, desc="emoji", unit="image", disable=None if progress else True)
    for emoji in bar:
        picture = font.draw(emoji, size)
        name = _name(package.EMOJI_DATA[emoji]["en"])
        if picture is None:
            missing.append(name)
            continue
        found = attributes_of(emoji)
        plain = without_tone("".join(c for c in emoji if c not in TONES))
        if found.skin_tone and plain is not None and picture.tobytes() == plain.tobytes():
            alike.append(name)
            continue
        file = f"images/{_hex(emoji)}.png"
        picture.save(out / file)
        rows.append(
            {
                "path": file,
                "caption": [_name(package.EMOJI_DATA[emoji][code]) for code in languages],
                "held_out": is_held_out(emoji),
                "emoji": emoji,
                "base": bases[found.base],
                "gender": found.gender or ("person" if found.base in gendered else ""),
                "skin_tone": found.skin_tone,
            }
        )
    about |= {
        "images": len(rows),
        "held_out": sum(row["held_out"] for row in rows),
        "not_in_the_font": missing,
        "no_skin_tone_in_the_font": alike,
    }
    with atomic_write(captions) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
    with atomic_write(about_path) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def _base_names(all_emoji: Iterable[str], data: dict[str, dict[str, str]]) -> dict[str, str]:
    """English name of each base: that of its plainest emoji."""

    def plainness(emoji: str) -> tuple[bool, int, int, str]:
        found = attributes_of(emoji)
        gendered = sum(gender != "person" for gender in found.gender.split(", ") if gender)
        return bool(found.skin_tone), gendered, len(emoji), emoji

    names: dict[str, str] = {}
    for emoji in sorted(all_emoji, key=plainness):
        names.setdefault(attributes_of(emoji).base, _name(data[emoji]["en"]))
    return names


def _name(name: str) -> str:
    """`:woman_firefighter:` to `woman firefighter`."""
    return name.strip(":").replace("_", " ")


def _hex(emoji: str) -> str:
    return "-".join(f"{ord(character):x}" for character in emoji)


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue = picture.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()
