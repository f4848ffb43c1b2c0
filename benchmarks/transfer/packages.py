"""Debian packages with labelled real audio, and what the names of their files say about it.

Every rule turns a path inside its package into a :class:`Clip`, or None for a file that is not wanted. What an encoder
may see is decided here as well (``PRETRAINING``): whole collections are kept away from it for the probes.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.transfer.sound_classes import sound_class


@dataclass
class Clip:
    """Labels of a sound.

    Attributes:
        domain: "speech", "music" or "environment".
        corpus: the recordings it belongs to.
        item: the phrase or the sound; equal items have equal content.
        kind: prompt, line, word, track, effect or note.
        lang, speaker: of speech.
        label: class for a task, or "".
        group: what must not be split over training and test.
    """

    domain: str
    corpus: str
    item: str
    kind: str
    lang: str = ""
    speaker: str = ""
    label: str = ""
    group: str = ""


Rule = Callable[[str], Clip | None]  # of a path below the package's folder, with extension

# (corpus, domain) that an encoder may be trained on.
PRETRAINING = {
    ("asterisk-core", "speech"),
    ("tuxpaint", "speech"),
    ("ufoai", "speech"),
    ("fillets", "speech"),
    ("opsound", "music"),
    ("wesnoth", "music"),
    ("lincity", "music"),
    ("ufoai", "music"),
    ("hedgewars", "music"),
    ("fillets", "music"),
    ("ufoai", "environment"),
    ("lincity", "environment"),
    ("wesnoth", "environment"),
    ("hedgewars", "environment"),
    ("fillets", "environment"),
}


@dataclass(frozen=True)
class Package:
    """Location of the sounds of a package.

    Attributes:
        name: as ``apt-get download`` takes it.
        folders: below ``usr/share``; the first that exists is used.
        rule: see :data:`Rule`; None for a sound font, whose notes describe themselves.
        only: pattern that paths below the folder must contain.
        container: extension of the files to unpack, "" for plain sound files.
    """

    name: str
    folders: tuple[str, ...]
    rule: Rule | None
    only: str = ""
    container: str = ""

    def wants(self, path: str) -> bool:
        return not self.only or bool(re.search(self.only, path))


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _telephone(lang: str, speaker: str, corpus: str, depth: int = 1) -> Rule:
    """Prompts of a telephone exchange, one voice: the path below ``depth`` folders is the phrase."""

    def rule(path: str) -> Clip | None:
        item = _stem(path).split("/", depth)[-1]
        if re.search(r"silence|beep|tone|/space$", item):
            return None
        return Clip("speech", corpus, item, "prompt", lang, speaker, group=item)

    return rule


def _track(corpus: str) -> Rule:
    return lambda path: Clip("music", corpus, _stem(path), "track", group=path)


def _tuxpaint(path: str) -> Clip | None:
    name = _stem(path)
    described = re.search(r"_desc(?:_([A-Za-z_@]+))?$", name)
    if described:
        lang, item = described.group(1) or "en", name[: described.start()]
        return Clip("speech", "tuxpaint", item, "word", lang, f"tuxpaint-{lang}", group=item)
    symbol = re.match(r"(symbols/math/(?:\d|operators)|symbols/alphabets/.*?)(?:_([a-z]{2}(?:_[A-Za-z]{2})?))?$", name)
    if symbol:
        item, lang = symbol.group(1), symbol.group(2) or "en"
        return Clip("speech", "tuxpaint", item, "word", lang, f"tuxpaint-{lang}", group=item)
    if re.search(r"dreydl|apollo", name):
        return Clip("speech", "tuxpaint", name, "word", "en", group=name)
    music = name.startswith("hobbies/music") or "final-roll-call" in name
    label = "" if music else sound_class(name)
    return Clip("music" if music else "environment", "tuxpaint", name, "effect", label=label, group=name)


def _fillets(path: str) -> Clip | None:
    name = _stem(path)
    if path.startswith("music/"):
        return Clip("music", "fillets", name, "track", group=name)
    line = re.match(r"sound/(.*?)/([a-z]{2})/(.*)$", name)
    if line is None:
        return Clip("environment", "fillets", name, "effect", label=sound_class(name), group=name)
    level, lang, text = line.groups()
    role = re.search(r"-(m|v)(?=-|$|\d)", text)
    speaker = f"fillets-{lang}-{role.group(1)}" if role else ""
    return Clip("speech", "fillets", f"{level}/{text}", "line", lang, speaker, group=level)


def _hedgewars(path: str) -> Clip | None:
    name = _stem(path)
    if name.startswith("Music/"):
        return Clip("music", "hedgewars", name, "track", group=name)
    voice = re.match(r"Sounds/voices/([^/]+)/(.*)", name)
    if voice:
        who, text = voice.groups()
        return Clip("speech", "hedgewars", text, "line", "", f"hedgewars-{who}", group=text)
    sound = re.match(r"Sounds/(.*)", name)
    if sound is None or re.match(r"hogchant|custom", sound.group(1)):
        return None
    item = sound.group(1)
    if re.match(r"\d[A-G]$|ride_of", item):
        return Clip("music", "hedgewars", item, "effect", group=item)
    return Clip("environment", "hedgewars", item, "effect", label=sound_class(item), group=item)


def _effects(corpus: str) -> Rule:
    """Sounds of a game: most are environment, names of jingles, news and music tell the others."""

    def rule(path: str) -> Clip | None:
        name = _stem(path)
        if re.search(r"(^|/)ui/|soundstuff_mono|(^|/)Click$|Window(Open|Close)$", name):
            return None
        domain = "environment"
        if re.search(r"horn-signals|fanfare|wardrums|gamestart|disco|jingle|music/", name):
            domain = "music"
        if re.search(r"tv_news|radiomessage", name):
            domain = "speech"
        label = sound_class(name) if domain == "environment" else ""
        kind = "track" if "music/" in name else "effect"
        if "footstep" in name:
            kind, label = "footstep", "footstep"
        return Clip(domain, corpus, name, kind, label=label, group=re.sub(r"[-_.]?\d*[ab]?$", "", name))

    return rule


def _gcompris(path: str) -> Clip | None:
    name = re.sub(r"^gcompris/src/", "", _stem(path)).replace("/resource", "").strip("/")
    if re.search(r"silence|click|dash$|dot$|bleep|core/sounds/(?!water|crash)", name):
        return None
    if re.search(r"explore_world_music|instruments/|guitar|melody|intro|LaPause|Buddhist_gong", name):
        kind = "track" if "world_music" in name or name.endswith("intro") else "effect"
        return Clip("music", "gcompris", name, kind, group=name)
    return Clip("environment", "gcompris", name, "effect", label=sound_class(name), group=re.sub(r"\d+$", "", name))


_SOUNDS = "asterisk/sounds"
_CORE = {
    "en": ("en_US", "allison-en"),
    "es": ("es_MX", "allison-es"),
    "fr": ("fr_CA", "june"),
    "it": ("it_IT", "carlo"),
    "ru": ("ru_RU", "ru"),
}

PACKAGES: tuple[Package, ...] = (
    *(
        Package(
            f"asterisk-core-sounds-{lang}-g722",
            (_SOUNDS,),
            _telephone(lang, speaker, "asterisk-core"),
            only=rf"^{locale}[^/]*/.*\.g722$",
        )
        for lang, (locale, speaker) in _CORE.items()
    ),
    Package("asterisk-prompt-es-co", (f"{_SOUNDS}/es",), _telephone("es", "es-co", "asterisk-prompt", 0), r"\.gsm$"),
    Package(
        "asterisk-prompt-fr-armelle", (f"{_SOUNDS}/fr",), _telephone("fr", "armelle", "asterisk-prompt", 0), r"\.gsm$"
    ),
    Package(
        "asterisk-prompt-it-menardi-wav",
        (f"{_SOUNDS}/it_IT_f_Menardi",),
        _telephone("it", "paola", "asterisk-prompt", 0),
    ),
    Package("asterisk-moh-opsound-g722", ("asterisk/moh",), _track("opsound"), r"\.g722$"),
    Package("tuxpaint-stamps-default", ("tuxpaint/stamps",), _tuxpaint),
    Package(
        "fillets-ng-data",
        ("games/fillets-ng",),
        _fillets,
        r"^music/|/en/|^sound/share/[^/]+$|^sound/[^/]+/[^/]+\.ogg$",
    ),
    Package("fillets-ng-data-cs", ("games/fillets-ng",), _fillets, r"/cs/"),
    Package("hedgewars-data", ("games/hedgewars/Data",), _hedgewars),
    Package("wesnoth-1.16-music", ("games/wesnoth/1.16/data/core/music",), _track("wesnoth")),
    Package(
        "wesnoth-1.16-data",
        ("games/wesnoth/1.16/data/core/sounds", "games/wesnoth/1.16/sounds"),
        _effects("wesnoth"),
    ),
    Package("lincity-ng-data", ("lincity-ng", "games/lincity-ng"), _effects("lincity")),
    Package("ufoai-sound", ("games/ufoai/base",), _effects("ufoai"), container=".pk3"),
    Package("minetest-data", ("minetest", "games/minetest"), _effects("minetest")),
    Package("openttd-opensfx", ("games/openttd/baseset/opensfx",), _effects("opensfx"), container=".cat"),
    Package("gcompris-qt-data", ("gcompris-qt/rcc",), _gcompris, container=".rcc"),
    Package("fluid-soundfont-gm", ("sounds/sf2",), None, container=".sf2"),
)
