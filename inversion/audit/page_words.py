"""Holds the report's fixed words: meanings, terms, limits, and where documents ask for an item."""

from dataclasses import dataclass

from inversion.audit.verdict import IDENTIFIABLE, INCOMPLETE, NOT_SHOWN, RECONSTRUCTION


@dataclass(frozen=True)
class Meaning:
    """Says what one verdict means to a reader who knows no machine learning."""

    #: The class of its badge on the page.
    kind: str
    #: The headline about one update.
    one: str
    #: The headline about several updates, {count} of them.
    several: str
    #: What the verdict does not say.
    limit: str
    #: What remains to be feared.
    residual: str


#: Verdict → its meaning.
MEANINGS = {
    RECONSTRUCTION: Meaning(
        "leak",
        "Private images can be rebuilt from what this client sends.",
        "Private images can be rebuilt from at least one of the {count} updates.",
        "What was found is a fact about these test images; other images may leak more or less.",
        "Whoever reads the update (the server, its logs, anybody on the way) can see private "
        "images. Treat the update like the images themselves.",
    ),
    IDENTIFIABLE: Meaning(
        "trace",
        "Private images can be recognised by what this client sends.",
        "Private images can be recognised by at least one of the {count} updates.",
        "The images were recognised among others, not rebuilt clearly on average; a stronger "
        "attack may rebuild them.",
        "Whoever reads the update and has candidate images can tell which of them were used. "
        "A stronger attack may show the images themselves.",
    ),
    NOT_SHOWN: Meaning(
        "none",
        "These attacks found no private image in what this client sends.",
        "These attacks found no private image in the {count} updates.",
        "This is no proof of safety: a stronger or a later attack may succeed.",
        "A stronger attack, more time, or knowledge that this attacker did not have may still "
        "succeed. Only a formal guarantee (section 6) covers every attack.",
    ),
    INCOMPLETE: Meaning(
        "open",
        "This audit gives no answer: it is not complete.",
        "This audit of {count} updates gives no answer: it is not complete.",
        "It says neither that images leak nor that they do not.",
        "The risk is unknown. Remove what made the audit incomplete (section 7), then repeat it.",
    ),
}

#: The meaning of "identifiable" where no image is identified by itself.
TRACES = Meaning(
    "trace",
    "What this client sends carries measurable traces of its private images.",
    "At least one of the {count} updates carries measurable traces of its private images.",
    "The traces show in the images taken together; no single image was singled out. A stronger "
    "attack may single some out, or rebuild them.",
    "Whoever reads the update can tell that it comes from images like these. A stronger attack may "
    "tell single images, or show them.",
)

#: Code of a warning → what it is about. The warning's text tells the fact.
WARNINGS = {
    "few-images": "Precision",
    "bn-unprotected": "Batch statistics",
    "optimiser-limited": "Time of an attack",
    "labels-given": "Labels",
    "running-statistics": "Weights",
    "no-decoys": "Test",
    "decoys-are-crops": "Test images",
    "part-refused": "Attack not possible",
    "part-missing": "Attack missing",
    "part-incomplete": "Attack without an answer",
    "positive-control-failed": "Check of the attack",
}

TEST_AGAIN = (
    "another network, or other weights to start from",
    "another batch size",
    "another number of local steps, or learning rate",
    "a new defence, or other values of this one",
    "another kind of images, or another image size",
    "a new attack is published",
    "in any case after a year",
)

LIMITS = (
    "It holds for the attacks, the time and the test images of sections 3 and 4, and for an "
    "attacker who reads what is sent (section 2) and changes nothing.",
    "It concerns one update. A client that sends many gives away more.",
    "It concerns images. That somebody took part, or a property of a whole group, was not tested.",
    "The test accepts a false alarm for 4 of 100 updates that give nothing away, each update "
    "tested by itself. A leak that is weaker than the test can see stays unseen.",
)

GLOSSARY = (
    ("update, gradient", "what a client sends instead of its data: numbers that tell how to "
     "improve the network, computed from its private images"),
    ("batch", "the private images that one update was computed from"),
    ("matching (short, long)", "an attack that changes pictures step by step until they would give "
     "the same update; long takes more steps"),
    ("layerwise", "an attack that works out the images from the update directly, one layer of the "
     "network after the other"),
    ("control", "what can be made without the client's update: mean image (the average of public "
     "photographs), prior only and decoder only (the attack with no update), other gradient (the "
     "attack on an update from other images)"),
    ("decoy", "another image that could have been in the place of a private one; identified means "
     "that the private image is told from its decoys"),
    ("p", "the probability of such a result if nothing leaked; leakage is stated at 0.04 or below"),
    ("SSIM", "likeness of two images in structure: 1 for equal ones, near 0 for unrelated ones"),
    ("PSNR", "likeness of two images in decibels (dB): from 30 on hard to tell apart; "
     "leakage is a difference of two such values, so that +20 dB is no likeness of 20"),
    ("ε, δ", "the strength of differential privacy, a formal guarantee against every attack: the "
     "smaller, the stronger"),
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Says where three documents ask for what a section of the report gives."""

    section: int
    item: str
    #: EDPB Opinion 28/2024: paragraphs.
    edpb: str
    #: ISO/IEC 27559:2022: clauses with their titles.
    iso: str
    #: NIST SP 800-226: section titles.
    nist: str


#: A document that has nothing on an item.
NOTHING = "–"
REFERENCES = (
    Reference(1, "System, hashes, date", "para 58 (documentation)",
              "9.2 Before data are made available", NOTHING),
    Reference(2, "What leaves the site",
              "para 46 (context of release); para 58(c) (threat model)",
              "6.2 Threat modelling; 6.2.3 Motives and capacity to re-identify", "4: Trust Models"),
    Reference(3, "Test images", "para 55 (scope and quantity of tests)",
              "7.2 Data features; 7.3.3 Population or sample-based attack", NOTHING),
    Reference(4, "Attacks, budget",
              "para 55(iv), (v) (model inversion, reconstruction)",
              "7.3 Attack modelling; 8.2.3 Adversarial testing",
              "2: on auditing and empirical measures"),
    Reference(5, "What leaked", "para 55 (results of tests)",
              "7.3.2 Maximum or average risk; 8.2.2 Quantifying identifiability",
              "2: on auditing and empirical measures"),
    Reference(6, "Protection, ε, bound", "on privacy-preserving techniques in training",
              "7.3.4 Data privacy models; 8.3.3 Transforming the data",
              "2: The Privacy Parameter ε; The Unit of Privacy"),
    Reference(7, "Warnings", "para 55 (quality of tests)", "8.2 Assessing identifiability",
              "2 to 4: on privacy hazards"),
    Reference(8, "Residual risk; test again", "para 55 (frequency of tests)",
              "8.3.4 Re-evaluation; 9.3.2 Monitoring the data environment",
              "2: on several releases of the same data"),
    Reference(9, "Limits",
              "para 55 (evidence for the tested attacks alone)",
              "8.2.3 Adversarial testing", "2: on auditing, which proves no guarantee"),
    Reference(10, "Command", "para 58 (documentation)",
              "9.2.3 Establishing principles, policies and procedures", NOTHING),
)  # fmt: skip
SOURCES = (
    "EDPB: Opinion 28/2024 on AI models, 17 December 2024. It speaks of trained models; the update "
    "of a client is held against it by analogy. ISO: ISO/IEC 27559:2022, clause titles as in its "
    "table of contents. NIST: SP 800-226, March 2025, sections by number and title. Words without "
    "a number or a capital name a topic of the document, not a clause."
)
NO_ADVICE = (
    "This table shows where such findings belong. It is no legal advice and no statement of "
    "conformity: whether a duty is met is for the controller and the authority to decide."
)
