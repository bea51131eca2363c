"""Sentences with private things in them, and where: what the tiny privacy filter is trained and
measured on. Used by train_privacy_demo.py, beside which it lies.

Every choice is on one of two sides: templates, and formats of entities, that are trained on, and
others that are held out. Entities come from Faker in several locales, or from the formats below;
sentences from the templates below. Some sentences hold nothing private, and things that look so.
"""

import calendar
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from faker import Faker

LABELS = (
    "account_number",
    "private_address",
    "private_date",
    "private_email",
    "private_person",
    "private_phone",
    "private_url",
    "secret",
)
SHORT = {
    "ACCOUNT": "account_number",
    "ADDRESS": "private_address",
    "DATE": "private_date",
    "EMAIL": "private_email",
    "PERSON": "private_person",
    "PHONE": "private_phone",
    "URL": "private_url",
    "SECRET": "secret",
}
TRAINED_LOCALES = (
    "en_US",
    "en_US",
    "en_US",
    "en_GB",
    "en_GB",
    "de_DE",
    "fr_FR",
    "es_ES",
    "it_IT",
    "nl_NL",
    "pt_BR",
    "pl_PL",
    "sv_SE",
    "cs_CZ",
    "tr_TR",
)
HELD_OUT_LOCALES = ("en_IN", "da_DK", "fi_FI", "ro_RO", "hu_HU", "pt_PT")
FIELD = re.compile(r"\{([A-Z]+)\}")
MARKS = ("- ", "* ", "> ", "1. ", "NOTE: ", "\t", "    ", "| ", "(", '"')  # before a sentence
MARKED_SHARE = 0.15
WORDS = (
    "harbour",
    "meadow",
    "copper",
    "lantern",
    "falcon",
    "willow",
    "ember",
    "quartz",
    "saffron",
    "tundra",
    "velvet",
    "cobalt",
    "maple",
    "orbit",
    "prism",
    "raven",
    "summit",
    "thistle",
    "umbra",
    "vortex",
)


@dataclass(frozen=True)
class Entity:
    """A private thing in a text: characters `start` to `end`."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Sentence:
    text: str
    entities: tuple[Entity, ...]


@dataclass(frozen=True)
class Side:
    """What may be drawn: templates, negatives, locales, and formats by field."""

    templates: Sequence[str]
    negatives: Sequence[str]
    locales: Sequence[str]
    formats: dict[str, Sequence[Callable[["Draw"], str]]]


class Draw:
    """One source of chance: everything that a seed decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.fakers: dict[str, Faker] = {}
        self.locale = "en_US"

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
        return self.pick(WORDS)

    def day(self) -> tuple[int, int, int]:
        return (
            self.random.randint(1930, 2026),
            self.random.randint(1, 12),
            self.random.randint(1, 28),
        )


MONTHS = tuple(calendar.month_name)[1:]
ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


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


TRAINED_FORMATS: dict[str, Sequence[Callable[[Draw], str]]] = {
    "PERSON": (person, person, person, first_name, name_with_initial, name_with_title, lower_name),
    "ADDRESS": (address, address, street, street_and_city),
    "DATE": (date_numeric, date_written),
    "EMAIL": (email, email, email_capital),
    "PHONE": (phone, phone_shaped),
    "URL": (url, url_bare, url_query),
    "ACCOUNT": (iban, card, account_plain),
    "SECRET": (password, api_key, pass_phrase),
}
HELD_OUT_FORMATS: dict[str, Sequence[Callable[[Draw], str]]] = {
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
    said = draw.faker("en_US").sentence(draw.random.randint(2, 8)).rstrip(".")
    return said if draw.random.random() < 0.5 else said.lower()


# What fills a field that is not private.
FILLERS: dict[str, Callable[[Draw], str]] = {
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

TRAINED_TEMPLATES = tuple(
    line
    for line in """\
My name is {PERSON} and I live at {ADDRESS}.
Please call {PERSON} on {PHONE} before {TIME}.
You can reach me at {EMAIL} or {PHONE}.
{PERSON} was born on {DATE} in {CITY}.
Dear {PERSON}, thank you for your order {ORDER}.
Send the contract to {EMAIL}, please.
The password is {SECRET}, do not share it.
Use the API key {SECRET} for the staging server.
Transfer {MONEY} to account {ACCOUNT}.
IBAN: {ACCOUNT}, account holder {PERSON}
Our new address is {ADDRESS}.
Visit {URL} for the details.
His profile is at {URL}.
{PERSON} <{EMAIL}>
From: {PERSON} <{EMAIL}>
To: {EMAIL}, {EMAIL}
Name: {PERSON}
Full name: {PERSON}
Email: {EMAIL}
E-mail address: {EMAIL}
Phone: {PHONE}
Tel. {PHONE}
Mobile: {PHONE}
Address: {ADDRESS}
Date of birth: {DATE}
DOB: {DATE}
Born: {DATE}
Account number: {ACCOUNT}
Card number {ACCOUNT}, expires next year
Website: {URL}
password={SECRET}
api_key = "{SECRET}"
export TOKEN={SECRET}
Authorization: Bearer {SECRET}
user={EMAIL} ip={IP} status=200
{ISO} {TIME} INFO login by {EMAIL} from {IP}
{ISO} {TIME} WARN payment failed for {PERSON}, card {ACCOUNT}
{PERSON},{EMAIL},{PHONE}
{PERSON};{DATE};{ADDRESS}
{{"name": "{PERSON}", "email": "{EMAIL}"}}
{{"phone": "{PHONE}", "iban": "{ACCOUNT}"}}
Hi {PERSON}, it was good to see you yesterday.
Thanks, {PERSON}
Best regards,\\n{PERSON}\\n{PHONE}
Kind regards, {PERSON}, {COMPANY}
{PERSON} and {PERSON} met in {CITY} to talk about the budget.
The meeting with {PERSON} is on {DATE} at {TIME}.
She moved to {ADDRESS} in {YEAR}.
The patient, {PERSON}, was admitted on {DATE}.
Ship it to {PERSON}, {ADDRESS}.
Her phone number is {PHONE} and her e-mail is {EMAIL}.
Please charge card {ACCOUNT} for {MONEY}.
I think {PERSON} will take over from {PERSON} next week.
Ask {PERSON} whether the report is done.
According to {PERSON}, the release slipped again.
{PERSON} wrote the first version of {FUNCTION}.
Reset link: {URL}
The invoice {ORDER} was paid from {ACCOUNT} on {DATE}.
Log in with {EMAIL} and the password {SECRET}.
The secret key is {SECRET}.
Contact: {PERSON}, {PHONE}, {EMAIL}
Customer {PERSON} called again about ticket {ORDER}.
Can you forward this to {PERSON} at {EMAIL}?
My bank account is {ACCOUNT} at {COMPANY}.
Ich heiße {PERSON} und wohne in {ADDRESS}.
Bitte rufen Sie {PERSON} unter {PHONE} an.
Sehr geehrte Frau {PERSON}, vielen Dank für Ihre Nachricht.
Meine E-Mail-Adresse lautet {EMAIL}.
Geboren am {DATE}, Kontonummer {ACCOUNT}.
Je m'appelle {PERSON} et j'habite {ADDRESS}.
Vous pouvez me joindre au {PHONE} ou à {EMAIL}.
Me llamo {PERSON} y mi teléfono es {PHONE}.
Mi dirección es {ADDRESS}.
Mi chiamo {PERSON}, la mia email è {EMAIL}.
Mijn naam is {PERSON}, ik woon op {ADDRESS}.
Nazywam się {PERSON}, mój numer to {PHONE}.
Meu nome é {PERSON} e meu e-mail é {EMAIL}.
mail me at {EMAIL} pls
call {PERSON} now, {PHONE}
birthday: {DATE}
our wifi password is {SECRET}
# TODO({PERSON}): remove this before {DATE}
Signed by {PERSON} on {DATE}.
git config user.email {EMAIL}
Author: {PERSON} <{EMAIL}>
curl -H "X-Api-Key: {SECRET}" {URL}
postgres://admin:{SECRET}@db.{WORD}.internal/main
The parcel for {PERSON} went to {ADDRESS} by mistake.
Interview with {PERSON}, {DATE}, {TIME}
See {URL} or write to {EMAIL}.
<name>{PERSON}</name>
<li>{EMAIL}</li>
<a href="{URL}">{WORD}</a>
| {PERSON} | {EMAIL} | {NUMBER} |
| {DATE} | {PERSON} | {MONEY} |
Attendees: {PERSON}, {PERSON}
Present: {PERSON} ({COMPANY}), {PERSON} ({COMPANY})
[{TIME}] ERROR user {EMAIL} not found
[{WORD}] token {SECRET} expired
Participants of the {WORD} course: {PERSON}, {PERSON}, {PERSON} and {PERSON}.
{PERSON} lives at {ADDRESS} since {DATE}.
Is {PERSON} still at {ADDRESS}?
I told {PERSON} that {PERSON} would call.
My son {PERSON} turns {NUMBER} on {DATE}.
We met {PERSON} on {DATE}, remember?
{PERSON} speaking, how can I help?
This is {PERSON} from {COMPANY}.
{PERSON}'s phone is {PHONE}.
name: {PERSON}\nphone: {PHONE}\nemail: {EMAIL}
customer={PERSON} account={ACCOUNT}
login: {EMAIL} / {SECRET}
{TALK} {PERSON} {TALK}.
{TALK} {PERSON}, {TALK}.
{TALK} {EMAIL} {TALK}
{TALK} {PHONE}.
{TALK}: {ADDRESS}
{TALK} {ADDRESS}, {TALK}.
{TALK} on {DATE}.
{TALK} {ACCOUNT} {TALK}.
{TALK} {URL} {TALK}
{TALK} password {SECRET} {TALK}
{TALK} key {SECRET}
{PERSON} {TALK}.
{PERSON} {TALK} {PERSON} {TALK}.""".splitlines()
)
TRAINED_NEGATIVES = tuple(
    """\
Version {VERSION} fixes the crash in {FUNCTION}.
commit {HASH} on branch {WORD}
Released {VERSION} on {ISO}.
RELEASE_DATE = "{ISO}"
The build {HASH} took {NUMBER} seconds.
def {FUNCTION}(value, limit={NUMBER}):
{ISO} {TIME} INFO started {FUNCTION} in {NUMBER} ms
{ISO}T{TIME}:00Z DEBUG cache miss for key {HASH}
pip install {WORD}=={VERSION}
error in {PATH} at line {NUMBER}
The weather in {CITY} was fine.
{COMPANY} opened an office in {CITY}.
{COMPANY} earned {MONEY} million in {YEAR}.
Order {ORDER} contains {NUMBER} items.
sha256:{HASH}
request id {UUID}
The server listens on port {NUMBER} at {IP}.
In {YEAR} the {WORD} project had {NUMBER} members.
Chapter {NUMBER} deals with the {WORD} theorem.
It costs {MONEY} and weighs {NUMBER} kg.
The train leaves at {TIME} from platform {NUMBER}.
copyright {YEAR} {COMPANY}
from {WORD} import {FUNCTION}
return {FUNCTION}({NUMBER}, {NUMBER})
Please read the manual first.
We will discuss this tomorrow morning.
The quick brown fox jumps over the lazy dog.
There are {NUMBER} open issues and {NUMBER} closed ones.
Merge branch '{WORD}' into main ({HASH})
changed: {PATH} ({NUMBER} lines)
Thank you for your message, we will answer soon.
The password must have at least {NUMBER} characters.
Enter your e-mail address and your phone number.
Your account number is printed on the card.
Das Wetter in {CITY} war schön.
La réunion commence à {TIME}.
assert {FUNCTION}("{ISO}") == {NUMBER}
{WORD}: {NUMBER}
const {WORD} = {NUMBER};
Serial {ORDER}, firmware {VERSION}
Il fait beau à {CITY}.
El tren sale a las {TIME}.
{TALK}.
{TALK}. {TALK}.
{TALK} {NUMBER} {TALK}.
{TALK} {VERSION} {TALK}
{TALK} ({HASH})
{TALK} {COMPANY} {TALK}.""".splitlines()
)
HELD_OUT_TEMPLATES = tuple(
    """\
Good morning, this is {PERSON} speaking, my number is {PHONE}.
We sent the keys to {PERSON} ({ADDRESS}) last Friday.
If anything is unclear, write to {EMAIL} or look at {URL}.
The reference for the payment is {ACCOUNT}; it was made on {DATE}.
Someone committed the token {SECRET} to the repository!
Participant: {PERSON}; birth date {DATE}; telephone {PHONE}
Attendees were {PERSON}, {PERSON} and {PERSON}.
The tenant of {ADDRESS} is {PERSON}.
{TIME} [auth] rejected {EMAIL}: wrong password {SECRET}
<td>{PERSON}</td><td>{PHONE}</td><td>{EMAIL}</td>
owner: {PERSON}\\niban: {ACCOUNT}\\nhomepage: {URL}
Did {PERSON} tell you that the wedding is on {DATE}?
I forgot to mention that {PERSON} no longer works for {COMPANY}.
Refund {MONEY} to {ACCOUNT} and inform {EMAIL}.
Wer kann {PERSON} erreichen? Die Nummer {PHONE} ist besetzt.
Nous avons envoyé le colis à {PERSON}, {ADDRESS}.
El paciente {PERSON} nació el {DATE}.
Bookmark {URL}, the login is {SECRET}.
cc {EMAIL}; bcc {EMAIL}
{PERSON}'s new place: {ADDRESS}""".splitlines()
)
HELD_OUT_NEGATIVES = tuple(
    """\
Upgrade from {VERSION} to {VERSION} before {ISO}-rc is cut.
npm WARN deprecated {WORD}@{VERSION}: use {WORD} instead
fatal: bad object {HASH}
[{ISO} {TIME}] worker {NUMBER} finished job {UUID}
since = date.fromisoformat("{ISO}")
Shares of {COMPANY} rose by {NUMBER} percent to {MONEY}.
The museum in {CITY} has {NUMBER} rooms.
No personal data is stored in {PATH}.
Please keep your password secret.
checksum {HASH} does not match {HASH}
The part number {ORDER} was replaced by {ORDER}.
for {WORD} in range({NUMBER}): {FUNCTION}({WORD})""".splitlines()
)

TRAINED = Side(TRAINED_TEMPLATES, TRAINED_NEGATIVES, TRAINED_LOCALES, TRAINED_FORMATS)
HELD_OUT = Side(HELD_OUT_TEMPLATES, HELD_OUT_NEGATIVES, HELD_OUT_LOCALES, HELD_OUT_FORMATS)


def mixed(templates: Side, formats: Side) -> Side:
    """The templates of one side with the locales and formats of another."""
    return Side(templates.templates, templates.negatives, formats.locales, formats.formats)


def draw_sentence(draw: Draw, side: Side, negative_share: float = 0.3) -> Sentence:
    """One sentence of a side."""
    draw.locale = draw.pick(side.locales)
    negative = draw.random.random() < negative_share
    template = draw.pick(side.negatives if negative else side.templates)
    return fill(draw, side, template.replace("\\n", "\n"))


def fill(draw: Draw, side: Side, template: str) -> Sentence:
    """A template with its fields filled in; private ones are noted."""
    text, entities, last = "", [], 0
    for field in FIELD.finditer(template):
        text += plain(template[last : field.start()])
        name, last = field.group(1), field.end()
        if name in SHORT:
            value = draw.random.choice(side.formats[name])(draw).strip()
            entities.append(Entity(len(text), len(text) + len(value), SHORT[name]))
        else:
            value = FILLERS[name](draw)
        text += value
    return Sentence(text + plain(template[last:]), tuple(entities))


def plain(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def draw_text(draw: Draw, side: Side, sentences: int) -> Sentence:
    """Several sentences as one text, on one line or on several."""
    text, entities = "", []
    for index in range(sentences):
        part = draw_sentence(draw, side)
        text += draw.pick((" ", "\n", "\n", "\n\n", "\r\n")) if index else ""
        text += draw.pick(MARKS) if draw.random.random() < MARKED_SHARE else ""
        entities += [Entity(e.start + len(text), e.end + len(text), e.label) for e in part.entities]
        text += part.text
    return Sentence(text, tuple(entities))
