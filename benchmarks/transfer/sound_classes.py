"""Classes of environmental sounds from the file names that game packages give them."""

import re

# The first pattern that matches decides; checked by hand on the packages of packages.py. Fantasy creatures, magic,
# user interfaces and other sounds without a class in the world come first and get none.
_PATTERNS = [
    (
        "",
        r"naga|drake|lich|ghoul|skeleton|mermaid|mermen|wose|yeti|squishy|hiss|aliens/|alien[a-z_-]|magic|laser|plasma|"
        r"sinegun|portal|ufo|warp|tardis|psi|needler|tv_static|toyland|seasonal/chr|weird|heal|frozen_hog|graveimpact|"
        r"melon|firewasteland|firestation|rubberduck|cake|lobbyprivmsg|popup|alien|scooter|space/|filter_sweep|"
        r"undefined|chroma|wail|hellish|beep|splat-|powerup|rewind|realrainbow|geoscape/(?!combat)",
    ),
    ("weapon", r"(bow|gun|cannon|shot).*fire|weapons/(?!flamer|medikit|irgoggles)"),
    (
        "animal",
        r"animals/|\bbirds?\d|_bird|wolf|bat-flap|bat-hit|gryphon|horse|sheep|cow\b|lion|monkey|frog|bark|\bbee|cricket|"
        r"chicken|\bowl|\bpig\b|\bcat\b|\bdog\b|duck|tusker|blackcat|bat_left|birdylay|farm\d|crow$|bloodspider",
    ),
    (
        "voice",
        r"human-|elf-hit|dwarf-|orc-|goblin-|ogre-|troll-|soldiers/|civilians/|laugh|groan|crowd|croud|applause|faces/|"
        r"hell_|kiss|yoohoo|school\d|burp|breath|oooh|marketfull",
    ),
    ("footstep", r"footstep|(^|/)steps|icy_walk"),
    ("water", r"water|splash|droplet|drip|bubble|bubles|\brain|harbor|lake|fountain|toilet|splat$"),
    ("fire", r"(?<!-)fire\d|firesoft|smallfire|fire$|fire_|campfire|flame|torch|molotov|(^|/)fire"),
    ("storm", r"thunder[123]|lightning|wind\d?$|heavy-wind|arcticwind|windmillh|night|morning"),
    (
        "weapon",
        r"weapons/|explo|gun|bow|sword|axe|club|mace|spear|knife|dagger|shot|cannon|mortar|grenade|sling|bullet",
    ),
    (
        "machine",
        r"engine|machine|train|rail|\bcar\b|car_|carengine|\bbus\b|truck|jet|plane|helicopter|-horn|traf|minepump|"
        r"industry|factory|power|generator|vacuum|washing|jackhammer|chainsaw|sawmill|saw\b|drill|diesel|hover-|ship$|"
        r"recycle|substation|motor|cart_|crossing|flyby|coalmine|oremine|mill\d|turbine|mining-mach|firetruck|uturn",
    ),
    (
        "impact",
        r"break|door|chest|dig|dug|place_|hammer|glass|blacksmith|gold|coin|money|metal_hit|crash|raze|knock|bottle|"
        r"scissors",
    ),
]
_COMPILED = [(name, re.compile(pattern)) for name, pattern in _PATTERNS]


def sound_class(name: str) -> str:
    """The class of a sound by the name of its file, or "" where the name does not tell."""
    name = name.lower()
    return next((label for label, pattern in _COMPILED if pattern.search(name)), "")
