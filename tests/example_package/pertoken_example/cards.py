"""What `pertoken list` and `pertoken show` say; imports no framework, so that they stay quick."""

from pertoken import Card

ECHO = Card(
    slug="echo",
    title="Echo: the last token again",
    family="decode",
    plug="generate",
    does="Drafts that the last token repeats itself.",
    use_when="Use it when text consists of long runs.",
    entry="pertoken_example.methods:Echo",
    call="model.generate(**inputs, do_sample=False, custom_generate=Echo())",
)

ONE_BY_ONE = Card(
    slug="one-by-one",
    title="One token after the other, without a cache",
    family="decode",
    plug="generate",
    does="Reads the whole text anew for every token.",
    use_when="Use it to see what a cache is worth.",
    entry="pertoken_example.methods:OneByOne",
)
