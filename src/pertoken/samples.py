"""A few prompts of our own writing, so that `pertoken compare` has something to do at once.

They are short, because plain decoding on two cores is slow, and mixed on purpose: editing,
extracting and summarising repeat their prompt and please drafters that copy; chat and sums do not.
All names and places are made up.
"""

from __future__ import annotations

from pertoken.prompts import Prompt

__all__ = ["SAMPLE"]

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
