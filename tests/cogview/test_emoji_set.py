"""Emoji as a data set: the attributes by their code points, and what is held out."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from cogview.cli import main
from cogview.data import emoji_set
from cogview.data.captions import CaptionedImages
from cogview.data.emoji_set import Attributes, attributes_of, find_font, is_held_out, prepare_emoji
from cogview.data.sources import open_source

emoji = pytest.importorskip("emoji", reason="the extra `data` is not installed")
ALL = [e for e, d in emoji.EMOJI_DATA.items() if d["status"] == emoji.STATUS["fully_qualified"]]


@pytest.fixture(scope="session")
def font() -> Path:
    try:
        return find_font()
    except FileNotFoundError as error:
        pytest.skip(f"{error}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("firefighter", Attributes("1f9d1-200d-1f692", "person", "")),
        ("woman_firefighter_medium_skin_tone", Attributes("1f9d1-200d-1f692", "woman", "medium")),
        ("man_running_facing_right_dark_skin_tone", Attributes("1f3c3-200d-27a1", "man", "dark")),
        ("woman_detective", Attributes("1f575", "woman", "")),
        ("thumbs_up_light_skin_tone", Attributes("1f44d", "", "light")),
        ("old_woman", Attributes("1f9d3", "woman", "")),
        ("man_medium_skin_tone", Attributes("1f9d1", "man", "medium")),
        ("Santa_Claus", Attributes("1f9d1-200d-1f384", "man", "")),
        (
            "women_holding_hands_dark_skin_tone",
            Attributes("1f9d1-200d-1f91d-200d-1f9d1", "woman, woman", "dark, dark"),
        ),
        (
            "woman_and_man_holding_hands_dark_skin_tone_light_skin_tone",
            Attributes("1f9d1-200d-1f91d-200d-1f9d1", "woman, man", "dark, light"),
        ),
        (
            "couple_with_heart_person_person_light_skin_tone_dark_skin_tone",
            Attributes("1f9d1-200d-2764-200d-1f9d1", "person, person", "light, dark"),
        ),
        ("handshake_light_skin_tone_dark_skin_tone", Attributes("1f91d", "", "light, dark")),
        ("female_sign", Attributes("2640", "", "")),
        ("avocado", Attributes("1f951", "", "")),
    ],
)
def test_attributes(name: str, expected: Attributes) -> None:
    assert attributes_of(emoji.emojize(f":{name}:")) == expected


def test_a_tenth_of_the_combinations_is_held_out_and_everything_is_seen() -> None:
    toned = [e for e in ALL if attributes_of(e).skin_tone]
    out = [e for e in toned if is_held_out(e)]
    assert 0.08 < len(out) / len(toned) < 0.12 and not any(map(is_held_out, set(ALL) - set(toned)))
    seen = defaultdict(set)
    for e in ALL:
        if not is_held_out(e):
            found = attributes_of(e)
            seen[found.base].add((found.gender, bool(found.skin_tone)))
            seen["tones"].add(found.skin_tone)
    for e in out:
        found = attributes_of(e)
        # The same base and gender without a tone, the base with another tone, and the tone.
        assert (found.gender, False) in seen[found.base] or (found.gender, True) in seen[found.base]
        assert any(has_tone for _, has_tone in seen[found.base])
        assert found.skin_tone in seen["tones"]
    assert "1f9d1-200d-1f692" in {attributes_of(e).base for e in out}  # a firefighter


def test_pictures_and_captions(tmp_path: Path, font: Path) -> None:
    about = prepare_emoji(tmp_path / "a", font, ["en", "zh"], 32, limit=60, progress=False)
    assert 40 <= about["images"] <= 70 and about["languages"] == ["en", "zh"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").open()]
    assert len(rows) == about["images"] and sum(r["held_out"] for r in rows) == about["held_out"]
    for row in rows:
        data = emoji.EMOJI_DATA[row["emoji"]]
        assert row["caption"] == [data[code][1:-1].replace("_", " ") for code in ("en", "zh")]
        assert row["held_out"] == is_held_out(row["emoji"])
        with Image.open(tmp_path / "a" / row["path"]) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
            assert len(image.getcolors(1024)) > 3
    images = CaptionedImages(open_source(tmp_path / "a"), 32, progress=False)
    assert images.captions == [tuple(row["caption"]) for row in rows]
    assert images.held_out.tolist() == [int(row["held_out"]) for row in rows]
    assert [dict(a)["skin_tone"] for a in images.attributes] == [r["skin_tone"] for r in rows]
    # The same again, over an earlier set with other settings.
    prepare_emoji(tmp_path / "b", font, ["en"], 16, limit=9, progress=False)
    prepare_emoji(tmp_path / "b", font, ["en", "zh"], 32, limit=60, progress=False)
    files = [
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1]


def test_the_command_prepares_what_the_others_read(
    tmp_path: Path, font: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "emoji"
    command = ["prepare", "emoji", "--out", str(out), "--size", "16", "--limit", "20", "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"not in the font): {out}\n")
    assert len(CaptionedImages(open_source(out), 16, progress=False)) > 10
    (out / "about.json").unlink()
    assert main(command) == 2
    assert "holds other data; choose an empty or a new folder" in capsys.readouterr().err
    wrong = ["prepare", "emoji", "--out", str(tmp_path / "x"), "--languages", "en", "tlh"]
    assert main(wrong) == 2
    assert "--languages: expected some of en es ja" in capsys.readouterr().err


def test_a_missing_font_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = "apt-get install fonts-noto-color-emoji"
    for fc_match, message in (
        ("", "fontconfig (fc-match) is not installed"),
        ("#!/bin/sh\nprintf 'False /usr/share/fonts/DejaVuSans.ttf'\n", "no colour-emoji font"),
    ):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        if fc_match:
            (tools / "fc-match").write_text(fc_match)
            (tools / "fc-match").chmod(0o755)
        monkeypatch.setenv("PATH", str(tools))
        assert main(["prepare", "emoji", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and advice in error and "--font" in error
    assert not (tmp_path / "out").exists()


def test_fonts_that_cannot_be_drawn(tmp_path: Path) -> None:
    import matplotlib

    plain = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    with pytest.raises(ValueError, match="expected a font with colour emoji, as bitmaps"):
        emoji_set.EmojiFont(plain)
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"a\.ttf: expected a font with colour emoji"):
        emoji_set.EmojiFont(tmp_path / "a.ttf")
    with pytest.raises(FileNotFoundError, match="font: no such file"):
        emoji_set.EmojiFont(tmp_path / "b.ttf")
