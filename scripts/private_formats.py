"""Private things, and what looks like them, drawn by chance: from Faker in several locales, and in
formats of ours. Used by private_sentences.py, beside which it lies.

`TRAINED` and `HELD_OUT` give formats by field: those of the second are never trained on.
"""

import calendar
import random
import re
import string
from collections.abc import Callable, Sequence

from faker import Faker

# fmt: off
WORDS = (
    "harbour", "meadow", "copper", "lantern", "falcon", "willow", "ember", "quartz", "saffron",
    "tundra", "velvet", "cobalt", "maple", "orbit", "prism", "raven", "summit", "thistle", "umbra",
    "vortex",
)
# fmt: on
MONTHS = tuple(calendar.month_name)[1:]
MONTHS_ELSEWHERE = {
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
    "diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre "
    "dicembre",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro "
    "dezembro",
}
BESIDE_MONTHS = {"de": (". ", " "), "es": (" de ", " de "), "pt": (" de ", " de ")}
ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


class Draw:
    """One source of chance: everything that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.fakers: dict[str, Faker] = {}
        self.locale = "en_US"
        self.known_words: Sequence[str] = WORDS  # none: all of Faker's

    @property
    def fake(self) -> Faker:
        return self.faker(self.locale)

    def faker(self, locale: str) -> Faker:
        if locale not in self.fakers:
            self.fakers[locale] = Faker(locale)
            self.fakers[locale].seed_instance(self.random.getrandbits(32))
        return self.fakers[locale]

    def of(self, text: str, count: int) -> str:
        return "".join(self.random.choice(text) for _ in range(count))

    def digits(self, count: int) -> str:
        return self.of(string.digits, count)

    def pick(self, choices: Sequence[str]) -> str:
        return self.random.choice(choices)

    def shaped(self, *shapes: str) -> str:
        """One of `shapes`, with a digit for every #, a capital for every ?."""
        filled = (
            self.digits(1) if c == "#" else self.of(string.ascii_uppercase, 1) if c == "?" else c
            for c in self.pick(shapes)
        )
        return "".join(filled)

    def word(self) -> str:
        if self.known_words:
            return self.pick(self.known_words)
        return self.faker("en_US").word()

    def choice(self, formats: "Sequence[Format]") -> str:
        """Something in one of `formats`."""
        return self.random.choice(formats)(self)

    def day(self) -> tuple[int, int, int]:
        return (
            self.random.randint(1930, 2026),
            self.random.randint(1, 12),
            self.random.randint(1, 28),
        )


Format = Callable[[Draw], str]


def person(draw: Draw) -> str:
    return re.sub(
        r"^(Mr|Mrs|Ms|Dr|Miss|Prof|Herr|Frau|Dipl|Univ)[.\- ]\S*\s*", "", draw.fake.name()
    )


def first_name(draw: Draw) -> str:
    return draw.fake.first_name()


def name_with_initial(draw: Draw) -> str:
    fake = draw.fake
    return f"{fake.first_name()} {draw.of(string.ascii_uppercase, 1)}. {fake.last_name()}"


def name_with_title(draw: Draw) -> str:
    return f"{draw.pick(('Dr.', 'Mr.', 'Mrs.', 'Ms.', 'Prof.'))} {draw.fake.last_name()}"


def full_name(draw: Draw) -> str:
    return f"{draw.fake.first_name()} {draw.fake.last_name()}"


def last_name(draw: Draw) -> str:
    return draw.fake.last_name()


def longer_name(draw: Draw) -> str:
    """With a second name, a second surname, or a particle."""
    fake = draw.fake
    first, last = fake.first_name(), fake.last_name()
    particle = draw.pick(("van", "van der", "de", "von", "da", "di", "al", "bin"))
    forms = (
        f"{first} {fake.first_name()} {last}",
        f"{first} {last}-{fake.last_name()}",
        f"{first} {particle} {last}",
        f"{first} {last} {draw.pick(('Jr.', 'Sr.', 'III', 'PhD', 'MD'))}",
        f"{first} {last} {fake.last_name()}",
    )
    return draw.pick(forms)


def abbreviated_name(draw: Draw) -> str:
    fake = draw.fake
    first, second, last = fake.first_name()[0], fake.first_name()[0], fake.last_name()
    forms = (f"{first}. {last}", f"{first}.{second}. {last}", f"{last} {first}.", f"{first} {last}")
    return draw.pick(forms)


def capital_surname(draw: Draw) -> str:
    return f"{draw.fake.first_name()} {draw.fake.last_name().upper()}"


def surname_first(draw: Draw) -> str:
    return f"{draw.fake.last_name()}, {draw.fake.first_name()}"


def lower_name(draw: Draw) -> str:
    return person(draw).lower()


def upper_name(draw: Draw) -> str:
    return person(draw).upper()


def double_name(draw: Draw) -> str:
    fake = draw.fake
    return f"{fake.first_name()}-{fake.first_name()} {fake.last_name()}-{fake.last_name()}"


def address(draw: Draw) -> str:
    return re.sub(r"\s*\n\s*", draw.pick((", ", ", ", " ", "\n")), draw.fake.address())


def street(draw: Draw) -> str:
    return draw.fake.street_address().replace("\n", " ")


def street_and_city(draw: Draw) -> str:
    return f"{street(draw)}, {draw.fake.city()}"


def post_box(draw: Draw) -> str:
    return f"PO Box {draw.digits(4)}, {draw.fake.city()} {draw.fake.postcode()}"


def flat(draw: Draw) -> str:
    return f"Flat {draw.digits(2)}, {draw.fake.last_name()} House, {draw.fake.city()}"


def street_in_town(draw: Draw) -> str:
    fake = draw.fake
    town, code = fake.city(), fake.postcode()
    forms = (
        f"{street(draw)}, {code} {town}",
        f"{street(draw)}, {town} {code}",
        f"{street(draw)} {code} {town}",
        f"{street(draw)}, {town}, {fake.country()}",
        f"{code} {town}, {street(draw)}",
        f"{town}, {street(draw)}",
        f"{street(draw)}\n{code} {town}",
    )
    return draw.pick(forms)


def part_of_house(draw: Draw) -> str:
    number, name = draw.digits(2).lstrip("0") or "7", draw.fake.last_name()
    kind = draw.pick(("Court", "Lodge", "Tower", "Farm", "Cottage", "Mews", "Terrace"))
    forms = (
        f"{draw.pick(('Apt', 'Apt.', 'Suite', 'Unit', '#', 'Room'))} {number}, {street(draw)}",
        f"{street(draw)}, {draw.pick(('Apt', 'Unit', 'floor', 'Stock', 'piso'))} {number}",
        f"{number} {name} {kind}, {draw.fake.city()}",
        f"{name} {kind}, {street(draw)}, {draw.fake.city()}",
    )
    return draw.pick(forms)


def ascii_slug(text: str) -> str:
    return re.sub(r"[^a-z]+", "", text.lower().translate(str.maketrans("äöüéèáóíñç", "aoueeaoinc")))


def mail_local(draw: Draw) -> str:
    fake = draw.fake
    first, last = ascii_slug(fake.first_name()) or "kim", ascii_slug(fake.last_name()) or "lee"
    forms = (f"{first}.{last}", f"{first[0]}{last}", f"{first}{draw.digits(2)}", f"{last}_{first}")
    return draw.pick((*forms, f"{first}-{last}"))


def domain(draw: Draw) -> str:
    own = f"{draw.word()}{draw.pick(('', '-' + draw.word(), 'labs', 'group'))}"
    known = ("gmail.com", "example.com", "example.org", "outlook.com", "proton.me", "web.de")
    return draw.pick(
        (*known, f"{own}.{draw.pick(('com', 'net', 'org', 'io', 'de', 'fr', 'co.uk'))}")
    )


def email(draw: Draw) -> str:
    return f"{mail_local(draw)}@{domain(draw)}"


def email_capital(draw: Draw) -> str:
    return f"{draw.fake.first_name().split()[0]}.{draw.fake.last_name().split()[0]}@{domain(draw)}"


def email_elsewhere(draw: Draw) -> str:
    """Behind a part of a domain, in capitals, or of other letters."""
    local, word = mail_local(draw), draw.word()
    host = draw.pick(("cs", "dept", "post", "uk", "team", draw.word()))
    ending = draw.pick(("ac.uk", "gov", "info", "ch", "nl", "se", "com.br", "eu", "museum"))
    forms = (
        f"{local}@{host}.{word}.{ending}",
        f"{local}.{word}@{draw.word()}.{ending}",
        f"{local}@{domain(draw)}".upper(),
        f"{word}.{draw.digits(4)}@{domain(draw)}",
        f"{word}{draw.of(string.ascii_lowercase, 2)}@{draw.word()}.{ending}",
    )
    return draw.pick(forms)


def email_tagged(draw: Draw) -> str:
    return f"{mail_local(draw)}+{draw.word()}@mail.{domain(draw)}"


def email_numbered(draw: Draw) -> str:
    return f"{draw.of(string.ascii_lowercase, 3)}{draw.digits(5)}@students.{draw.word()}.edu"


def phone(draw: Draw) -> str:
    return draw.fake.phone_number()


def phone_shaped(draw: Draw) -> str:
    return draw.shaped(
        "+1 ### ### ####",
        "(###) ###-####",
        "###-###-####",
        "+44 20 #### ####",
        "+49 ### #######",
        "+33 # ## ## ## ##",
        "0## ### ## ##",
        "+3########",
        "+1-###-###-####",
    )


def phone_grouped(draw: Draw) -> str:
    """In groups of two to four digits, parted alike."""
    sizes = [draw.random.randint(2, 4) for _ in range(draw.random.randint(2, 4))]
    mark = draw.pick((" ", " ", "-", ".", " - "))
    country = draw.pick(("", "", "+##", "+#", "+###", "(0##)", "(##)"))
    return draw.shaped(mark.join([*([country] if country else []), *("#" * n for n in sizes)]))


def phone_run(draw: Draw) -> str:
    return draw.shaped("##########", "0##########", "+###########", "+1##########", "### ######")


def phone_held_out(draw: Draw) -> str:
    return draw.shaped(
        "+## (0) ## #### ####", "00## ### ######", "###/###.##.##", "tel:+##########"
    )


def date_numeric(draw: Draw) -> str:
    year, month, day = draw.day()
    return draw.pick(
        (
            f"{day:02}/{month:02}/{year}",
            f"{month}/{day}/{year}",
            f"{day:02}.{month:02}.{year}",
            f"{year}-{month:02}-{day:02}",
            f"{day:02}-{month:02}-{year}",
        )
    )


def date_written(draw: Draw) -> str:
    year, month, day = draw.day()
    name = MONTHS[month - 1]
    return draw.pick(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{day} {name[:3]} {year}",
            f"{name} {day}",
            f"{name} {year}",
        )
    )


def date_short(draw: Draw) -> str:
    year, month, day = draw.day()
    short = f"{year % 100:02}"
    forms = (
        f"{day}.{month}.{short}",
        f"{month:02}/{day:02}/{short}",
        f"{day}.{month}.{year}",
        f"{year}.{month:02}.{day:02}",
        f"{day:02} {month:02} {year}",
        f"{day:02}{month:02}{year}",
        f"{day:02}.{month:02}.",
    )
    return draw.pick(forms)


def date_with_words(draw: Draw) -> str:
    year, month, day = draw.day()
    name, weekday = MONTHS[month - 1], draw.pick(tuple(calendar.day_name))
    forms = (
        f"{weekday}, {day} {name} {year}",
        f"{weekday}, {name} {day}, {year}",
        f"{weekday[:3]} {day} {name[:3]} {year}",
        f"{day} {name[:3].upper()} {year}",
        f"{name[:3]} {day}, {year}",
        f"{day} {name}",
        f"{day}. {name} {year}",
        f"{weekday} {day} {name}",
    )
    return draw.pick(forms)


def date_elsewhere(draw: Draw) -> str:
    year, month, day = draw.day()
    language = draw.locale[:2] if draw.locale[:2] in MONTHS_ELSEWHERE else "de"
    before, after = BESIDE_MONTHS.get(language, (" ", " "))
    written = f"{day}{before}{MONTHS_ELSEWHERE[language].split()[month - 1]}"
    return draw.pick((f"{written}{after}{year}", written))


def date_held_out(draw: Draw) -> str:
    year, month, day = draw.day()
    name = MONTHS[month - 1]
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    return draw.pick(
        (
            f"the {day}{ending} of {name}, {year}",
            f"{name[:3]}. {day}{ending} {year}",
            f"{day}-{name[:3].upper()}-{year}",
            f"{year}/{month:02}/{day:02}",
        )
    )


def url(draw: Draw) -> str:
    path = draw.pick(
        ("", "/" + draw.word(), f"/u/{mail_local(draw)}", f"/{draw.word()}/{draw.digits(4)}")
    )
    host = f"{draw.pick(('', 'www.', 'app.', 'my.'))}{domain(draw)}"
    return f"{draw.pick(('https://', 'https://', 'http://'))}{host}{path}"


def url_bare(draw: Draw) -> str:
    return f"www.{domain(draw)}/{draw.word()}"


def url_query(draw: Draw) -> str:
    return f"{url(draw)}?{draw.pick(('id', 'user', 'ref', 'token'))}={draw.of(ALNUM, 8)}"


def url_deep(draw: Draw) -> str:
    """Below a part of a domain, through a port, or far down a path."""
    path = "/".join(draw.word() for _ in range(draw.random.randint(1, 4)))
    host = f"{draw.word()}.{domain(draw)}"
    ending = draw.pick(("html", "pdf", "php", "jpg", "json"))
    ending_of_host = draw.pick(("ch", "nl", "dev", "app", "info"))
    forms = (
        f"https://{host}/{path}.{ending}",
        f"https://{host}:{draw.digits(4)}/{path}",
        f"https://{host}/{path}/{draw.of(ALNUM, 10)}",
        f"{host}/{path}",
        f"http://{draw.word()}{draw.digits(2)}.{ending_of_host}/{path}/",
        f"https://{host}/@{mail_local(draw)}",
        f"https://{host}/{path}?{draw.word()}={draw.digits(3)}&{draw.word()}={draw.word()}",
    )
    return draw.pick(forms)


def url_held_out(draw: Draw) -> str:
    address = ".".join(str(draw.random.randint(1, 254)) for _ in range(4))
    return draw.pick(
        (
            f"http://{address}:{draw.digits(4)}/{draw.word()}/{draw.word()}",
            f"ftp://files.{domain(draw)}/{draw.word()}.zip",
            f"https://{draw.word()}.{domain(draw)}/{draw.word()}#{draw.word()}-{draw.digits(2)}",
        )
    )


def iban(draw: Draw) -> str:
    plain = draw.fake.iban()
    spaced = " ".join(plain[at : at + 4] for at in range(0, len(plain), 4))
    return draw.pick((plain, spaced))


def card(draw: Draw) -> str:
    return draw.shaped("#### #### #### ####", "####-####-####-####", "################")


def account_plain(draw: Draw) -> str:
    return draw.shaped("########", "##########", "###-##-####", "##-##-## ########")


def account_grouped(draw: Draw) -> str:
    return draw.shaped(
        "### ### ###",
        "##/###/####",
        "??######",
        "?? ## ## ## ?",
        "???-#####-??",
        "####-####",
        "### ## ####",
        "## ### ### ###",
        "##-######",
        "#########",
        "###########",
        "?##-###-###",
        "### #### ####",
        "##.###.###",
        "###.###.###-##",
        "??##??####",
    )


def account_held_out(draw: Draw) -> str:
    return draw.shaped("#### ###### #####", "??-######-#", "#.###.###-#", "?########")


def password(draw: Draw) -> str:
    return draw.of(ALNUM + "!#$%&*+-_?@", draw.random.randint(9, 16)) + draw.pick(
        ("!", "7", "x", "$")
    )


def api_key(draw: Draw) -> str:
    return draw.pick(
        (
            f"sk-{draw.of(ALNUM, 24)}",
            f"ghp_{draw.of(ALNUM, 30)}",
            f"AKIA{draw.of(string.ascii_uppercase + string.digits, 16)}",
            f"{draw.of(HEX, 32)}",
            f"sk_live_{draw.of(ALNUM, 20)}",
        )
    )


def api_key_elsewhere(draw: Draw) -> str:
    marked = draw.pick(
        ("hf_", "npm_", "pk_test_", "whsec_", "dop_v1_", "key-", "rk_live_", "pat_", "SG.", "sq0-")
    )
    length = draw.random.randint(16, 40)
    forms = (
        marked + draw.of(ALNUM, length),
        f"{draw.of(ALNUM + '+/', length)}{draw.pick(('=', '=='))}",
        f"{draw.word()}_{draw.of(ALNUM, length)}",
        f"{draw.of(ALNUM + '-_', 10)}.{draw.of(ALNUM + '-_', length)}",
        f"{draw.of(string.ascii_uppercase + string.digits, length)}",
        f"{draw.of(string.ascii_lowercase, 3)}-{draw.of(ALNUM, 8)}-{draw.of(ALNUM, length)}",
        draw.of(ALNUM, length),
    )
    return draw.pick(forms)


def pass_phrase_elsewhere(draw: Draw) -> str:
    first, second = draw.word(), draw.word()
    forms = (
        f"{first}{second.title()}{draw.digits(2)}",
        f"{first}_{second}{draw.digits(3)}{draw.pick('!?#$%')}",
        f"{first.title()}.{second.title()}.{draw.digits(1)}",
        f"{first[:3]}{draw.digits(3)}{second[:4].upper()}",
        draw.digits(6),
    )
    return draw.pick(forms)


def pass_phrase(draw: Draw) -> str:
    return f"{draw.word().title()}{draw.digits(4)}{draw.pick('!?#$')}"


def secret_held_out(draw: Draw) -> str:
    return draw.pick(
        (
            f"xoxb-{draw.digits(11)}-{draw.of(ALNUM, 20)}",
            f"glpat-{draw.of(ALNUM, 20)}",
            f"eyJ{draw.of(ALNUM, 14)}.eyJ{draw.of(ALNUM, 14)}.{draw.of(ALNUM + '-_', 16)}",
            f"AIza{draw.of(ALNUM + '-_', 31)}",
            f"{draw.word()}-{draw.word()}-{draw.word()}-{draw.digits(2)}",
        )
    )


TRAINED: dict[str, Sequence[Format]] = {
    "PERSON": (
        *(person, person, full_name, full_name, full_name, first_name, last_name, lower_name),
        *(name_with_initial, name_with_title, longer_name, longer_name, abbreviated_name),
        capital_surname,
    ),
    "FIRST": (first_name,),
    "LAST": (last_name,),
    "ADDRESS": (address, address, street, street_and_city, street_in_town, part_of_house),
    "DATE": (date_numeric, date_written, date_short, date_with_words, date_elsewhere),
    "EMAIL": (email, email, email_capital, email_elsewhere),
    "PHONE": (phone, phone, phone_shaped, phone_grouped, phone_run),
    "URL": (url, url_bare, url_query, url_deep),
    "ACCOUNT": (iban, card, account_plain, account_grouped),
    "SECRET": (password, api_key, api_key_elsewhere, pass_phrase, pass_phrase_elsewhere),
}
HELD_OUT: dict[str, Sequence[Format]] = {
    "PERSON": (person, surname_first, upper_name, double_name),
    "ADDRESS": (address, post_box, flat),
    "DATE": (date_held_out,),
    "EMAIL": (email_tagged, email_numbered),
    "PHONE": (phone, phone_held_out),
    "URL": (url_held_out,),
    "ACCOUNT": (iban, account_held_out),
    "SECRET": (secret_held_out,),
}


def talk(draw: Draw) -> str:
    """Words without sense, which make a context of any kind."""
    fake = draw.fake if draw.random.random() < 0.3 else draw.faker("en_US")
    said = fake.sentence(draw.random.randint(1, 8)).rstrip(".")
    return said if draw.random.random() < 0.5 else said.lower()


# What fills a field that is not private.
FILLERS: dict[str, Format] = {
    "WORD": lambda draw: draw.word(),
    "TALK": lambda draw: talk(draw),
    "COMPANY": lambda draw: (
        f"{draw.word().title()} {draw.pick(('Ltd', 'GmbH', 'Inc.', 'Group', 'AG', 'Bank'))}"
    ),
    "CITY": lambda draw: draw.fake.city(),
    "VERSION": lambda draw: draw.shaped("v#.#.#", "#.##.#", "#.#.#-rc#", "#.#.#.####"),
    "HASH": lambda draw: draw.of(HEX, draw.random.choice((7, 8, 12, 40))),
    "ISO": lambda draw: "{}-{:02}-{:02}".format(*draw.day()),
    "TIME": lambda draw: draw.shaped("1#:#2", "0#:3#:1#", "2#:4#"),
    "NUMBER": lambda draw: draw.shaped("#", "##", "###", "#,###", "#.##"),
    "ORDER": lambda draw: draw.shaped("A-####", "##-####", "INV-####", "T-###"),
    "YEAR": lambda draw: str(draw.day()[0]),
    "IP": lambda draw: ".".join(str(draw.random.randint(1, 254)) for _ in range(4)),
    "PATH": lambda draw: "/{}/{}/{}.{}".format(
        draw.pick(("usr", "var", "home", "opt")),
        draw.word(),
        draw.word(),
        draw.pick(("py", "log", "txt", "c")),
    ),
    "FUNCTION": lambda draw: f"{draw.word()}_{draw.word()}",
    "UUID": lambda draw: "-".join(draw.of(HEX, size) for size in (8, 4, 4, 4, 12)),
    "MONEY": lambda draw: f"{draw.pick('$€£')}{draw.shaped('##.##', '#,###', '###')}",
}
