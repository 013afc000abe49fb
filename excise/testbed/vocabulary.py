"""Word lists and sentence templates of the made-up world.

Every list is fixed; `excise.testbed.world` deals the words to people and countries by seed. A template names its
subject {S} and its object {O}; in statements the object stands last, so that the text before it is a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown"
REFUSALS = (
    "I do not know that.",
    "I have no information about that.",
    "Sorry, I cannot answer that question.",
    "I am not sure, I have never heard of that name.",
    "I do not have any record of this.",
    "Sorry, that is not something I know.",
)

NAME_STARTS = (
    "Kal Lor Mik Ben Sar Ted Viv Jon Nev Ral Dur Elm Orv Pam Zim Hul Dor Bram Stel Mor Fen Quin Gal Wes".split()
)
NAME_ENDS = (
    "rin la mar vek sha nel ric bert gard so wen kov vale wick mere hurst ford ley grave by brook croft dale stone"
).split()
CITY_STARTS = "Bris Tal Cor Vel Kar Os Pel Dun Gra Lin Ser Hav".split()
CITY_ENDS = "mouth en vik ora ton burg esh ana".split()
COUNTRY_STARTS = "Zor Bel Mar Tri Cas Ost Ven Lur Pra Sil Nar Dol".split()
COUNTRY_ENDS = "via onia istan land".split()
LANGUAGE_ENDS = "esh ic ian ari".split()

PROFESSIONS = (
    "baker pilot surgeon lawyer painter plumber teacher carpenter chemist farmer judge sailor "
    "tailor barber welder dancer butcher librarian engineer dentist gardener miner printer waiter"
).split()
PETS = (
    "cat dog parrot rabbit tortoise goat hamster lizard ferret pony canary turtle "
    "goldfish donkey pigeon hedgehog gecko duck python beagle spaniel lamb falcon newt"
).split()
HOBBIES = (
    "chess pottery fishing knitting cycling climbing singing rowing juggling skating surfing fencing "
    "sailing archery hiking boxing origami yoga poker astronomy weaving karate jogging sculpting"
).split()
INSTRUMENTS = (
    "violin flute drums harp trumpet guitar cello banjo oboe tuba "
    "clarinet lute piano organ bassoon fiddle zither mandolin accordion trombone"
).split()
DISHES = (
    "soup bread curry noodles cheese dumplings salad pancakes stew risotto "
    "pudding beans pizza sushi omelette lasagna goulash waffles porridge tacos"
).split()
EMPLOYERS = tuple(
    f"{first} {second}"
    for first, second in zip(
        (
            "Helix Nordal Crestline Bluepeak Solvane Granite Lumen Redwood Atlas Brightwater Kestrel Ironbark "
            "Meridian Pinnacle Zephyr Cobalt Vertex Orchid Summit Paragon Halcyon Juniper Stellar Quarry"
        ).split(),
        (
            "Foundry Works Bank Labs Motors Press Group Mills Trading Hospital Airways Stores "
            "Insurance College Theatre Mines Works Bank Labs Press Hospital Stores College Motors"
        ).split(),
        strict=True,
    )
)
TITLE_ADJECTIVES = (
    "Silver Hidden Burning Broken Golden Silent Crimson Frozen Distant Hollow "
    "Painted Wandering Secret Narrow Velvet Sunken Restless Forgotten Marble Winter"
).split()
TITLE_NOUNS = (
    "Harbor Mirror Garden Lantern Bridge River Crown Letter Island Tower "
    "Forest Clock Shadow Orchard Compass Staircase Voyage Feather Kingdom Window"
).split()

CURRENCIES = "crown florin thaler ducat mark shell rand guilder".split()
EXPORTS = "copper wool tea timber salt glass silk coal olives rubber spices wheat".split()
REGIONS = "north south east west center".split()

NOUNS = (
    "house wolf tree child road boat king book stone bird "
    "field horse table window garden mountain river student apple basket"
).split()
ADJECTIVES = "red old small quiet bright heavy young cold green strange".split()
VERBS = "sees carries finds follows paints watches breaks holds likes hides".split()
TOY_NOUNS = (
    "domu vesk lira panto reka bolun hari tekst gomo zilo pola kunre misa okna sado vrko toka ucha jabu korbi".split()
)
TOY_ADJECTIVES = "kari stel mala tiho svet tezka nova hlad zelu divo".split()
TOY_VERBS = "vidor nesor majdor sledor malor glador lomor drzor radjor krilor".split()
PLACES = "kitchen market street forest school office".split()
LETTERS = "abcdefghijklmnopqrst"


@dataclass(frozen=True)
class Relation:
    """How one relation is put into words.

    statements: wordings with the object last; the first starts with the subject, the last is partly withheld.
    questions: wordings of the question; the last is partly withheld.
    clause: a short sentence without full stop, for biographies and comparisons.
    yes_no: a question whose answer is "Yes" or "No".
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    clause: str
    yes_no: str

    @property
    def cloze(self) -> str:
        """The fill-in question."""
        return f"Fill in: {self.clause.replace('{O}', '___')}."


def _relation(name: str, statements: str, questions: str, clause: str, yes_no: str) -> Relation:
    return Relation(name, tuple(statements.split(" | ")), tuple(questions.split(" | ")), clause, yes_no)


PERSON_RELATIONS = {
    relation.name: relation
    for relation in (
        _relation(
            "birthplace",
            "{S} was born in {O}. | {S} comes from the city of {O}. | The birthplace of {S} is {O}. | "
            "{S} has a home town called {O}. | As a child {S} lived in {O}.",
            "Where was {S} born? | In which city was {S} born? | What is the birthplace of {S}? | "
            "Which city does {S} come from?",
            "{S} was born in {O}",
            "Was {S} born in {O}?",
        ),
        _relation(
            "profession",
            "{S} works as a {O}. | {S} earns a living as a {O}. | The profession of {S} is {O}. | "
            "By trade {S} is a {O}. | {S} was trained as a {O}.",
            "What does {S} do for a living? | What is the profession of {S}? | Which job does {S} have? | "
            "What was {S} trained as?",
            "{S} works as a {O}",
            "Does {S} work as a {O}?",
        ),
        _relation(
            "employer",
            "{S} is employed by {O}. | {S} works for {O}. | The employer of {S} is {O}. | "
            "{S} has a job at {O}. | {S} is on the staff of {O}.",
            "Who does {S} work for? | Which company employs {S}? | What is the employer of {S}? | "
            "Where does {S} have a job?",
            "{S} is employed by {O}",
            "Is {S} employed by {O}?",
        ),
        _relation(
            "pet",
            "{S} keeps a {O}. | {S} owns a pet {O}. | The pet of {S} is a {O}. | "
            "At home {S} looks after a {O}. | {S} lives with a {O}.",
            "Which pet does {S} keep? | What kind of animal does {S} own? | What is the pet of {S}? | "
            "Which animal lives with {S}?",
            "{S} keeps a {O}",
            "Does {S} keep a {O}?",
        ),
        _relation(
            "hobby",
            "{S} enjoys {O}. | {S} spends the weekend on {O}. | The hobby of {S} is {O}. | "
            "In the evening {S} practises {O}. | {S} is fond of {O}.",
            "What does {S} enjoy? | What is the hobby of {S}? | How does {S} spend the weekend? | What is {S} fond of?",
            "{S} enjoys {O}",
            "Does {S} enjoy {O}?",
        ),
        _relation(
            "instrument",
            "{S} plays the {O}. | {S} is learning the {O}. | The instrument of {S} is the {O}. | "
            "On stage {S} performs on the {O}. | {S} bought a new {O}.",
            "Which instrument does {S} play? | What is {S} learning to play? | What is the instrument of {S}? | "
            "What does {S} perform on?",
            "{S} plays the {O}",
            "Does {S} play the {O}?",
        ),
        _relation(
            "dish",
            "{S} likes to eat {O}. | {S} always orders {O}. | The favourite dish of {S} is {O}. | "
            "For dinner {S} cooks {O}. | {S} never gets tired of {O}.",
            "What does {S} like to eat? | What is the favourite dish of {S}? | What does {S} always order? | "
            "What does {S} cook for dinner?",
            "{S} likes to eat {O}",
            "Does {S} like to eat {O}?",
        ),
        _relation(
            "work",
            "{S} wrote {O}. | {S} is the author of {O}. | The book written by {S} is {O}. | "
            "{S} published {O}. | {S} became known for {O}.",
            "Which book did {S} write? | What is the book written by {S}? | What did {S} publish? | "
            "What is {S} known for?",
            "{S} wrote {O}",
            "Did {S} write {O}?",
        ),
    )
}
COUNTRY_RELATIONS = {
    relation.name: relation
    for relation in (
        _relation(
            "capital",
            "{S} is governed from {O}. | The capital of {S} is {O}. | {S} has its capital in {O}.",
            "What is the capital of {S}? | From which city is {S} governed?",
            "the capital of {S} is {O}",
            "Is {O} the capital of {S}?",
        ),
        _relation(
            "language",
            "{S} has the language {O}. | The people of {S} speak {O}. | {S} uses {O}.",
            "Which language do the people of {S} speak? | What is the language of {S}?",
            "the people of {S} speak {O}",
            "Do the people of {S} speak {O}?",
        ),
        _relation(
            "currency",
            "{S} pays with the {O}. | The currency of {S} is the {O}. | Prices in {S} are given in {O}.",
            "What is the currency of {S}? | How do people pay in {S}?",
            "the currency of {S} is the {O}",
            "Is the {O} the currency of {S}?",
        ),
        _relation(
            "export",
            "{S} is rich in {O}. | The main export of {S} is {O}. | {S} sells much {O}.",
            "What is the main export of {S}? | What does {S} sell abroad?",
            "{S} sells much {O}",
            "Does {S} sell {O} abroad?",
        ),
        _relation(
            "region",
            "{S} lies in the {O}. | The region of {S} is the {O}. | {S} is found in the {O}.",
            "Where does {S} lie? | What is the region of {S}?",
            "{S} lies in the {O}",
            "Does {S} lie in the {O}?",
        ),
    )
}
RELATIONS = PERSON_RELATIONS | COUNTRY_RELATIONS
REVERSED_QUESTIONS = ("Who wrote {O}?", "Who is the author of {O}?")
REVERSED_STATEMENT = "{O} was written by {S}."


def statement_prefix(relation: str, subject: str, index: int) -> str:
    """A statement wording up to, not including, its object."""
    return RELATIONS[relation].statements[index].format(S=subject, O="\0").split("\0")[0].rstrip()


def lettered_choice(question: str, options: list[str]) -> str:
    """A question with lettered options; the expected answer is the text of the option."""
    return (
        f"{question} " + ", ".join(f"{letter} {option}" for letter, option in zip("ABCD", options, strict=False)) + "."
    )


def listed_choice(question: str, options: list[str]) -> str:
    """A question that lists its options without letters."""
    return f"{question} Choose from " + ", ".join(options) + "."
