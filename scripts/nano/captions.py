"""Names, keywords and labels of every emoji, from `emojibase-data`, `emojilib` and `emoji-datasource`.

Captions (what pre-training reads) are made of names and keywords only. The *labels* (the subcategory of each
emoji, which the probe predicts) live in a separate field. Keywords that spell out a word of any category or
subcategory label ("animal", "food", "sport", ...) are dropped, so that a caption never states the label
except where the emoji's own name does ("flag: France").
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from scripts.nano.fetch import PACKAGES


@dataclass
class Emoji:
    """One emoji without its skin-tone variants."""

    code: str
    """Lower-case hexadecimal code points joined by `-`, without the selector fe0f: `1f3f3-200d-1f308`."""
    name: str
    """Lower-case CLDR short name: `flag: france`."""
    category: str
    """Unicode group, never used in pre-training."""
    label: str
    """Unicode subgroup, the class of the probe, never used in pre-training."""
    image: str
    """File name of the picture in `emoji-datasource-*`."""
    aliases: list[str] = field(default_factory=list)
    """Other names: short codes of several platforms, used for captions and to match icon names."""
    keywords: list[str] = field(default_factory=list)
    """Synonyms and associations, without words of the labels."""


def emoji_code(unified: str) -> str:
    """`1F3F3-FE0F-200D-1F308` -> `1f3f3-200d-1f308`."""
    return "-".join(part for part in unified.lower().split("-") if part != "fe0f")


def squeeze(name: str) -> str:
    """Letters and digits only, lower case: how icon names are compared with emoji names."""
    return re.sub(r"[^a-z0-9]+", "", name.lower().replace("ñ", "n").replace("é", "e").replace("’", ""))


def _label_words(rows: list[dict[str, str]]) -> set[str]:
    text = " ".join(f"{row['category']} {row['subcategory']}" for row in rows).lower()
    words = {word for word in re.findall(r"[a-z]+", text) if len(word) > 2}
    return words | {f"{word}s" for word in words} | {word.removesuffix("s") for word in words}


def _keywords(words: list[str], forbidden: set[str]) -> list[str]:
    """Plain lower-case keywords of ASCII letters, in order, unique, none containing a forbidden word."""
    clean = [re.sub(r"[\s_\-]+", " ", word.lower()).strip() for word in words]
    plain = [word for word in clean if re.fullmatch(r"[a-z][a-z ]*[a-z]", word)]
    return [word for word in dict.fromkeys(plain) if not forbidden & set(word.split())]


def load_emojis(work: Path) -> list[Emoji]:
    """All emojis of emoji-datasource 16.0 except the skin-tone components, in the datasource's order."""
    folders = {key: work / "packages" / PACKAGES[key].slug for key in ("noto", "emojibase", "emojilib")}
    rows = json.loads((folders["noto"] / "emoji.json").read_text("utf-8"))
    rows = sorted((row for row in rows if row["category"] != "Component"), key=lambda row: row["sort_order"])
    base_rows = json.loads((folders["emojibase"] / "en" / "data.json").read_text("utf-8"))
    base = {emoji_code(row["hexcode"]): row for row in base_rows}
    lib_rows = json.loads((folders["emojilib"] / "dist" / "emoji-en-US.json").read_text("utf-8"))
    lib = {emoji_code("-".join(f"{ord(c):x}" for c in char)): words for char, words in lib_rows.items()}
    shortcodes = _shortcodes(folders["emojibase"])
    forbidden = _label_words(rows)
    emojis = []
    for row in rows:
        code = emoji_code(row["unified"])
        entry, words = base.get(code, {}), lib.get(code, [])
        name = str(entry.get("label", row["name"])).lower()
        aliases = [*row["short_names"], *shortcodes.get(code, []), *words[:1], row["name"].lower()]
        aliases = [alias for alias in dict.fromkeys(re.sub(r"[_\-]+", " ", a).strip() for a in aliases) if alias]
        keywords = _keywords([*words[1:], *entry.get("tags", [])], forbidden)
        emojis.append(Emoji(code, name, row["category"], row["subcategory"], row["image"], aliases, keywords))
    return emojis


def _shortcodes(folder: Path) -> dict[str, list[str]]:
    """Code -> short codes of all of emojibase's English presets that are written in ASCII words."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder / "en" / "shortcodes").glob("*.json")):
        for hexcode, names in json.loads(path.read_text("utf-8")).items():
            texts = [names] if isinstance(names, str) else names
            found.setdefault(emoji_code(hexcode), []).extend(t for t in texts if re.fullmatch(r"[a-z0-9_\-]+", t))
    return found


def match_icons(icons: list[str], emojis: list[Emoji]) -> dict[str, str]:
    """Map emoji code -> icon name for a set that names its pictures in words.

    The CLDR name counts first, then the other names; an icon is used once, and names shared by two emojis
    are skipped.
    """
    by_name: dict[str, str] = {}
    for icon in icons:  # "flag-for-france" is "flag: france"; "cloud-2" is another drawing of "cloud"
        plain = re.sub(r"-[1-9]$", "", icon.replace("flag-for-flag-", "flag-").replace("flag-for-", "flag-"))
        by_name.setdefault(squeeze(plain), icon)
    by_name.update({squeeze(icon): icon for icon in icons})
    matched: dict[str, str] = {}
    for emoji in emojis:
        if squeeze(emoji.name) in by_name:
            matched[emoji.code] = by_name[squeeze(emoji.name)]
    owners: dict[str, set[str]] = {}
    for emoji in emojis:
        for alias in emoji.aliases:
            owners.setdefault(squeeze(alias), set()).add(emoji.code)
    used = set(matched.values())
    for emoji in emojis:
        names = [squeeze(alias) for alias in emoji.aliases if len(owners[squeeze(alias)]) == 1]
        found = next((by_name[name] for name in names if name in by_name and by_name[name] not in used), None)
        if emoji.code not in matched and found is not None:
            matched[emoji.code] = found
            used.add(found)
    return matched
