"""English words that carry little by themselves: articles, pronouns, prepositions, auxiliaries.

A short list of our own. "not", "no", "never" and "nor" are left out of it on purpose: without them
a sentence says the opposite.
"""

__all__ = ["STOP_WORDS"]

_TEXT = """
    a an the this that these those such
    i me my mine myself you your yours yourself he him his himself she her hers herself it its
    itself we us our ours ourselves they them their theirs themselves one's
    who whom whose which what there here
    and or but so if then than as because while though although
    of in on at by for to from with into onto over under about between through during before after
    above below up down out off again upon within along across around
    am is are was were be been being do does did doing have has had having will would shall should
    can could may might must
    i'm you're he's she's it's we're they're i've you've we've they've i'd you'd he'd she'd we'd
    they'd i'll you'll he'll she'll we'll they'll that's there's
    just very too also only own same some any each both few more most other all s t
"""
STOP_WORDS = frozenset(_TEXT.split())
