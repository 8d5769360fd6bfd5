"""Real text to compare models on: the end of Lincoln's message to Congress of 1862 (public domain), and texts that tokenizers
find hard."""

MESSAGE = (
    "The plan is proposed as permanent constitutional law. It can not become such without the concurrence of, "
    "first, two-thirds of Congress, and afterwards three-fourths of the States. The requisite three-fourths of "
    "the States will necessarily include seven of the slave States. Their concurrence, if obtained, will give "
    "assurance of their severally adopting emancipation at no very distant day upon the new constitutional terms. "
    "This assurance would end the struggle now and save the Union forever. "
    "I do not forget the gravity which should characterize a paper addressed to the Congress of the nation by the "
    "Chief Magistrate of the nation, nor do I forget that some of you are my seniors, nor that many of you have "
    "more experience than I in the conduct of public affairs. Yet I trust that in view of the great "
    "responsibility resting upon me you will perceive no want of respect to yourselves in any undue earnestness I "
    "may seem to display. "
    "Is it doubted, then, that the plan I propose, if adopted, would shorten the war, and thus lessen its "
    "expenditure of money and of blood? Is it doubted that it would restore the national authority and national "
    "prosperity and perpetuate both indefinitely? Is it doubted that we here--Congress and Executive can secure "
    "its adoption? Will not the good people respond to a united and earnest appeal from us? Can we, can they, by "
    "any other means so certainly or so speedily assure these vital objects? We can succeed only by concert. It "
    'is not "Can any of us imagine better?" but "Can we all do better?" Object whatsoever is possible, still the '
    'question recurs, "Can we do better?" The dogmas of the quiet past are inadequate to the stormy present. The '
    "occasion is piled high with difficulty, and we must rise with the occasion. As our case is new, so we must "
    "think anew and act anew. We must disenthrall ourselves, and then we shall save our country. "
    "Fellow-citizens, we can not escape history. We of this Congress and this Administration will be remembered "
    "in spite of ourselves. No personal significance or insignificance can spare one or another of us. The fiery "
    "trial through which we pass will light us down in honor or dishonor to the latest generation. We say we are "
    "for the Union. The world will not forget that we say this. We know how to save the Union. The world knows we "
    "do know how to save it. We, even we here, hold the power and bear the responsibility. In giving freedom to "
    "the slave we assure freedom to the free--honorable alike in what we give and what we preserve. We shall "
    "nobly save or meanly lose the last best hope of earth. Other means may succeed; this could not fail. The way "
    "is plain, peaceful, generous, just--a way which if followed the world will forever applaud and God must "
    "forever bless."
)
HARD = (
    "",
    "a",
    "Naïve café - Ærøskøbing, 東京タワー, Привет! 😀\t[SEP] e\u0301",
    "x = {'a': 1}  # ünïcode\n\n\u00a0end",
)
