"""Questions with documents, made of templates: passages of invented handbooks, whose facts no model can know.

A passage states a few facts about one topic of one company; each question names the company and asks for one of them,
so the documents of another company do not hold the answer. Companies and topics to test with are others than those to
train on.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]


class Topic(NamedTuple):
    """A passage with places for facts, and questions with their answers."""

    passage: str
    questions: tuple[tuple[str, str], ...]


COMPANIES = {
    "train": (
        "Lindqvist Optics", "Harbour Foods", "Northgate Printing", "Bellamy Textiles", "Oakfield Dairy", "Tamar Cycles",
    ),
    "test": ("Ashdown Gliders", "Kestrel Paper", "Fenwick Lighting", "Duna Bakeries"),
}  # fmt: skip
FACTS = {
    "time": ("half past six", "seven", "a quarter to eight", "nine", "half past ten", "a quarter past four", "six"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "price": ("4", "7", "12", "19", "35", "48", "60", "85", "110", "240"),
    "count": ("two", "three", "five", "six", "eight", "nine", "eleven", "fourteen", "twenty"),
    "place": ("room 14", "the blue counter", "the east gate", "the second floor", "the old boathouse", "hall C"),
    "person": ("Mr Okafor", "Ms Halvorsen", "Dr Brandt", "Mrs Iyer", "Mr Castellanos", "Ms Petrova"),
    "thing": ("a green form", "a photograph", "the serial number", "a signed letter", "two copies of the receipt"),
}
TOPICS = {
    "train": (
        Topic(
            "The canteen of {company} opens at {time}. Lunch costs {price} euros, and guests pay at {place}. "
            "On {day} the kitchen is closed. Complaints go to {person}.",
            (
                ("When does the canteen open?", "{time}"),
                ("How much does lunch cost?", "{price} euros"),
                ("Who takes complaints about the food?", "{person}"),
            ),
        ),
        Topic(
            "{company} lends bicycles to its staff for up to {count} days. The deposit is {price} euros. Keys "
            "are kept at {place}. {person} repairs what is broken, every {day}.",
            (
                ("For how many days may I borrow a bicycle?", "{count}"),
                ("Where are the keys of the bicycles?", "{place}"),
                ("Who repairs the bicycles?", "{person}"),
            ),
        ),
        Topic(
            "New staff of {company} meet {person} on their first {day}. They bring {thing}. The tour starts "
            "at {time} from {place} and takes {count} hours.",
            (
                ("What do new staff bring on their first day?", "{thing}"),
                ("Where does the tour start?", "{place}"),
                ("How many hours does the tour take?", "{count}"),
            ),
        ),
        Topic(
            "Parcels for {company} are handed over at {place}. The last van leaves at {time}. A parcel may "
            "weigh up to {count} kilograms; heavier ones cost {price} euros more. Ask {person} for labels.",
            (
                ("Where do I hand over a parcel?", "{place}"),
                ("When does the last van leave?", "{time}"),
                ("Whom do I ask for labels?", "{person}"),
            ),
        ),
        Topic(
            "The parking garage of {company} has {count} places for guests. A day costs {price} euros. The "
            "gate closes at {time}. Whoever loses a ticket brings {thing} to {place}.",
            (
                ("How many places for guests does the garage have?", "{count}"),
                ("How much does it cost to park for a day?", "{price} euros"),
                ("What do I bring when I have lost my parking ticket?", "{thing}"),
            ),
        ),
        Topic(
            "{company} offers a language course every {day} at {time}. It is held in {place}, and {person} "
            "teaches it. Each course has {count} evenings and costs {price} euros.",
            (
                ("On which day is the language course?", "{day}"),
                ("Who teaches the language course?", "{person}"),
                ("How much does the language course cost?", "{price} euros"),
            ),
        ),
        Topic(
            "Meeting rooms of {company} are booked with {person}. The largest one is {place}, for {count} people. "
            "Bookings end at {time} without notice. Coffee for a meeting costs {price} euros.",
            (
                ("With whom do I book a meeting room?", "{person}"),
                ("Which meeting room is the largest?", "{place}"),
                ("How much is coffee for a meeting?", "{price} euros"),
            ),
        ),
        Topic(
            "The sports club of {company} trains every {day} at {time}. Members pay {price} euros a year and change "
            "in {place}. Beginners are welcome for {count} evenings without paying.",
            (
                ("On which day does the sports club train?", "{day}"),
                ("How much do members of the sports club pay a year?", "{price} euros"),
                ("For how many evenings may beginners come without paying?", "{count}"),
            ),
        ),
        Topic(
            "{person} is the doctor of {company} and sees staff every {day} in {place}. Come before {time}, and "
            "bring {thing}.",
            (
                ("Who is the company doctor?", "{person}"),
                ("Where does the doctor see staff?", "{place}"),
                ("What do I bring to the doctor?", "{thing}"),
            ),
        ),
        Topic(
            "At {company} old batteries and lamps are left at {place}. They are fetched every {day} at {time}. "
            "Up to {count} bags may stand there. For larger things, give {thing} to {person}.",
            (
                ("Where do I leave old batteries?", "{place}"),
                ("When are old lamps fetched?", "{time}"),
                ("Whom do I ask about larger waste?", "{person}"),
            ),
        ),
        Topic(
            "The nursery of {company} takes {count} children. It opens at {time}, and a month costs {price} euros. "
            "Parents sign up with {person} and bring {thing}.",
            (
                ("How many children does the nursery take?", "{count}"),
                ("When does the nursery open?", "{time}"),
                ("With whom do parents sign up?", "{person}"),
            ),
        ),
        Topic(
            "Work clothes of {company} are handed out at {place} every {day}. Everybody gets {count} shirts; a "
            "further one costs {price} euros. To change a size, show {thing}.",
            (
                ("On which day are work clothes handed out?", "{day}"),
                ("How many shirts does everybody get?", "{count}"),
                ("What do I show to change a size?", "{thing}"),
            ),
        ),
    ),
    "test": (
        Topic(
            "The library of {company} is in {place}. Books are lent for {count} weeks. A lost book costs "
            "{price} euros. {person} is there every {day} from {time} on.",
            (
                ("Where is the library?", "{place}"),
                ("For how many weeks may I keep a book?", "{count}"),
                ("How much do I pay for a lost book?", "{price} euros"),
            ),
        ),
        Topic(
            "{company} has its machines checked every {day}. Staff leave {thing} on the machine and wait at "
            "{place} until {time}. Questions are answered by {person}.",
            (
                ("On which day are the machines checked?", "{day}"),
                ("What do I leave on the machine?", "{thing}"),
                ("Who answers questions about the checks?", "{person}"),
            ),
        ),
        Topic(
            "The choir of {company} sings in {place} at {time}. It has {count} members. The conductor is "
            "{person}, and a ticket for the summer concert costs {price} euros.",
            (
                ("When does the choir sing?", "{time}"),
                ("Who conducts the choir?", "{person}"),
                ("How much is a ticket for the concert?", "{price} euros"),
            ),
        ),
        Topic(
            "Guests of {company} sleep in the guest house behind {place}. A night costs {price} euros. {person} has "
            "the keys and leaves at {time}. Nobody may stay for more than {count} nights.",
            (
                ("How much does a night in the guest house cost?", "{price} euros"),
                ("Who has the keys of the guest house?", "{person}"),
                ("For how many nights may a guest stay?", "{count}"),
            ),
        ),
        Topic(
            "Letters to staff of {company} lie in {place} from {time} on. Registered ones are given out by {person} "
            "for {thing}. There is no post on a {day}.",
            (
                ("Where do letters to staff lie?", "{place}"),
                ("Who gives out registered letters?", "{person}"),
                ("On which day is there no post?", "{day}"),
            ),
        ),
        Topic(
            "{company} has a garden of {count} plots for its staff. A plot costs {price} euros a year. Water is turned "
            "off at {time}. Tools are lent every {day} by {person}.",
            (
                ("How many plots does the garden have?", "{count}"),
                ("When is the water in the garden turned off?", "{time}"),
                ("Who lends garden tools?", "{person}"),
            ),
        ),
    ),
}  # fmt: skip


def questions(side: str) -> Rows:
    """Rows of one side, `train` or `test`: the question as `prompt`, the passage as `context`, and the `answer`."""
    chance, topics = random.Random(side), TOPICS[side]
    facts = {
        (company, topic): {name: chance.choice(values) for name, values in FACTS.items()}
        for company in COMPANIES[side]
        for topic in topics
    }
    rows: Rows = []
    for number in range(len(topics[0].questions)):
        for (company, topic), known in facts.items():
            question, answer = topic.questions[number]
            passage = topic.passage.format(company=company, **known)
            prompt = f"About {company}: {question}"
            rows.append({"prompt": prompt, "context": passage, "answer": answer.format(**known)})
    return rows
