"""Prompts and a conversation of our own writing, so that commands have something to do at once.

The prompts are short, because plain decoding on two cores is slow, and mixed on purpose: editing,
extracting and summarising repeat their prompt and please drafters that copy; chat and sums do not.
All names and places are made up.
"""

from __future__ import annotations

from pertoken.prompts import Prompt

__all__ = ["CONVERSATION", "SAMPLE"]

_CHAT = """\
My tomato plants stand on a balcony that gets sun only in the morning. Their leaves turn yellow \
from the bottom up. What could be the reason, and what should I try first?"""

_CODE_EDIT = """\
Add a parameter `unit` with the default "C" to this function, so that it also returns degrees \
Fahrenheit for "F". Reply with the whole function and nothing else.

```python
def mean_temperature(readings):
    \"\"\"Mean of the readings of one day, in degrees Celsius.\"\"\"
    if not readings:
        raise ValueError("there are no readings")
    total = 0.0
    for reading in readings:
        total += reading.celsius
    return total / len(readings)
```"""

_SUMMARISE = """\
Summarise the text in two sentences.

The old swing bridge over the mill canal was closed on Monday after a routine check found cracks \
in two of its main bearings. Until the bearings are replaced, buses of line 4 take the road past \
the harbour, which adds about ten minutes to each trip. Pedestrians and cyclists can use the \
footbridge behind the library. The town expects the new bearings within six weeks, because they \
must be cast to measure. Shops on the east bank fear for their summer trade and ask for a free \
ferry; the council will decide on it next Thursday."""

_EXTRACT = """\
Copy out every order from the message as a list with the fields item, number and price.

Good morning, please send us 12 boxes of printer paper at 4.50 each, 3 desk lamps at 29.90 each, \
40 folders with an elastic band at 1.20 each and 2 office chairs at 149.00 each. The desk lamps \
are urgent. Last time one box of printer paper was wet, so please wrap the boxes in foil."""

_TRANSLATE = """\
Translate into French: The library opens at nine. Please leave your bags in the lockers, switch \
off your phone, and bring the books back to the desk before you go."""

_MATHS = """\
A baker makes 18 trays with 24 rolls each. She sells three quarters of the rolls in the morning \
and half of the rest in the afternoon. How many rolls are left in the evening? Show each step."""

_REPEAT = """\
Correct the spelling and give back the whole text: The comittee recieved your aplication on the \
third of May. We will definately anwser befor the end of the month. Untill then, plese keep the \
orginal documents in a save place, and tell us at wonce if your adress changes."""

SAMPLE: list[Prompt] = [
    Prompt(_CHAT, "chat", "chat"),
    Prompt(_CODE_EDIT, "code edit", "code-edit"),
    Prompt(_SUMMARISE, "summarise", "summarise"),
    Prompt(_EXTRACT, "extract", "extract"),
    Prompt(_TRANSLATE, "translate", "translate"),
    Prompt(_MATHS, "maths", "maths"),
    Prompt(_REPEAT, "correct", "correct"),
]
"""Seven prompts of seven kinds, 45 to 160 tokens each with SmolLM2's tokenizer."""

# Later questions lean on earlier ones, so that a cache that forgets has something to lose.
_EXCHANGES = (
    ("I want to grow herbs on my kitchen windowsill. It faces east. Which three should I start "
     "with?", "Basil, chives and parsley. All three do well with morning sun."),
    ("How often do they need water?", "Check the soil with a finger each morning and water when "
     "the top is dry, usually every two days."),
    ("The pots have no holes. Is that a problem?", "Yes. Water collects at the bottom and the "
     "roots rot. Drill holes or put a smaller pot with holes inside."),
    ("What soil should I buy for them?", "A light herb soil with some sand. Rich soil makes the "
     "leaves large but weak in taste."),
    ("Which of the three can I harvest first?", "Chives. They are ready about six weeks after "
     "sowing; cut them two fingers above the soil."),
    ("And how do I cut the basil?", "Cut the stem just above a pair of leaves. Two new shoots grow "
     "from there."),
    ("Some leaves have small holes now. What could it be?", "Probably small caterpillars or "
     "snails. Look under the leaves in the evening and pick them off."),
    ("I go away for ten days in July. What happens to the plants?", "Without water they dry out. "
     "Put the pots in a tray with wet gravel, out of the sun."),
    ("Could I dry the parsley before that?", "You can, but it loses most of its taste. Freezing "
     "it, chopped, is better."),
    ("How long does frozen parsley keep?", "About eight months in a closed box."),
    ("Let us talk about lunch. I have eggs, two potatoes and the chives. What can I cook?",
     "A potato omelette. Fry thin slices of potato, add the eggs, and strew the chives on top."),
    ("How many eggs for two people?", "Four eggs are enough for two people."),
    ("Should the potatoes be cooked before?", "No, thin slices are done after ten minutes in the "
     "pan with a lid."),
    ("What can I serve with it?", "A green salad with a dressing of lemon, oil and a little "
     "mustard."),
    ("I have no lemon. What else is sour?", "Vinegar. Take half as much, because it is stronger."),
    ("Write me a shopping list for the omelette and the salad.", "Eggs, potatoes, chives, lettuce, "
     "oil, mustard, vinegar, salt and pepper."),
    ("How much will the cooking take in all?", "About twenty-five minutes: ten for the potatoes, "
     "five for the eggs, ten for the salad."),
    ("Which of my windowsill herbs would fit into the salad?", "Basil and parsley. Add them at the "
     "end, so that they stay fresh."),
    ("Remind me, which side does my window face?", "It faces east, so it has sun in the morning."),
    ("Thank you. Sum up in two sentences what I should do with the herbs this week.",
     "Drill holes into the pots and water them when the top of the soil is dry. Cut the chives and "
     "the basil, and freeze some parsley before you leave."),
)  # fmt: skip

CONVERSATION: list[dict[str, str]] = [
    {"role": role, "content": content}
    for exchange in _EXCHANGES
    for role, content in zip(("user", "assistant"), exchange, strict=True)
]
"""Twenty plain questions with short answers, as the messages of a chat."""
