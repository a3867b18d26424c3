"""Turns a folder of public-domain books (Markdown) into training documents for the demo model.

A document is a list of (is_special, text) pieces. Plain documents are whole chapters; chats are
passages dressed as an answer to a short request, in the same layout as the chat template, so that
the model learns both to write on and to answer and stop. Everything is a pure function of the
books and a random generator, so a seed fixes the training stream. Knows nothing of tokens.
"""

import re
from pathlib import Path

END, BEGIN, USER, ASSISTANT, SYSTEM = (
    "<|end|>",
    "<|begin|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
SPECIALS = [END, BEGIN, USER, ASSISTANT, SYSTEM]

# Books of github.com/mlschmitt/classic-books-markdown (944882722e9a), all in the public domain.
# How often each book is read in one epoch: plain language first, a little of the rest.
BOOKS = {
    "Aesop_-_Aesops_Fables": 2.0,
    "The_Brothers_Grimm_-_Grimms_Fairy_Tales": 2.0,
    "Hans_Christian_Andersen_-_Andersens_Fairy_Tales": 1.5,
    "Lewis_Carroll_-_Alices_Adventures_in_Wonderland": 1.0,
    "L._Frank_Baum_-_The_Wonderful_Wizard_of_Oz": 1.5,
    "J._M._Barrie_-_Peter_Pan": 1.0,
    "Rudyard_Kipling_-_The_Jungle_Book": 1.0,
    "Frances_Hodgson_Burnett_-_The_Secret_Garden": 1.0,
    "Mark_Twain_-_The_Adventures_of_Tom_Sawyer": 0.7,
    "Robert_Louis_Stevenson_-_Treasure_Island": 0.5,
    "Arthur_Conan_Doyle_-_A_Study_in_Scarlet": 0.3,
    "H.G._Wells_-_War_of_the_Worlds": 0.3,
    "Mary_Wollstonecraft_Shelley_-_Frankenstein": 0.3,
    "Jane_Austen_-_Pride_and_Prejudice": 0.2,
}

# Sections kept out of training, and how many characters of each are held out at most.
HELDOUT = {
    "The_Brothers_Grimm_-_Grimms_Fairy_Tales": ("SNOW-WHITE AND ROSE-RED", 7000),
    "L._Frank_Baum_-_The_Wonderful_Wizard_of_Oz": ("8. The Deadly Poppy Field", 7000),
    "Frances_Hodgson_Burnett_-_The_Secret_Garden": ("CHAPTER V - THE CRY IN THE CORRIDOR", 7000),
}

NOUNS = set(
    """king queen prince princess fox wolf lion bear dog cat mouse bird horse ass goat sheep lamb
    frog snake crow eagle cock hen goose duck hare tortoise monkey bee ant elephant tiger seal fish
    boy girl man woman child children mother father brother sister son daughter uncle aunt husband
    wife grandmother soldier tailor farmer shepherd miller fisherman hunter sailor captain doctor
    gardener servant merchant beggar thief robber pirate giant dwarf witch fairy wizard mermaid
    castle palace house cottage garden forest wood tree river sea island ship boat mountain moor
    road town village church school cave well door window key fire lamp ring crown sword gold
    silver money treasure star moon sun wind snow rain storm winter summer spring night morning
    apple bread cake rose flower nest egg wolf shoe coat hat bed mirror table clock letter book
    robin rabbit caterpillar scarecrow woodman crocodile nightingale swallow peacock stag spider
    jackal raven donkey pig bull ox kid kettle goblin angel ghost hero friend stranger""".split()
)

REQUESTS_ABOUT = [
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Please tell me a tale about {}.",
    "Write a short story about {}.",
    "I want to hear about {}.",
    "Do you know a story about {}?",
    "Tell me about {}.",
    "Write about {}.",
]
REQUESTS_ANY = [
    "Tell me a story.",
    "Tell me a tale, please.",
    "Write a short story.",
    "Once upon a time",
    "I would like to hear a story.",
    "Do you know a good story?",
]
REQUESTS_ON = [
    "And then?",
    "What happened next?",
    "Go on.",
    "Please go on.",
    "Tell me more.",
    "Continue.",
]
SYSTEMS = [
    "You are a storyteller.",
    "You are a helpful assistant.",
    "You tell stories to children.",
    "You are a kind old storyteller. Answer with a short tale.",
]

# Small talk, so that a greeting is not answered with a shipwreck.
TALK = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hello there!", "Good day."],
        "Hello! I am a small storyteller. Ask me for a story about a fox, a king or the sea.",
    ),
    (["Good morning.", "Good morning!"], "Good morning! What story shall I tell you today?"),
    (["Good night.", "Good night!"], "Good night! May you dream of a garden full of roses."),
    (
        ["Who are you?", "What are you?", "What is your name?"],
        "I am a very small language model. I learned to tell stories from old books, "
        "and I know nothing else.",
    ),
    (
        ["What can you do?", "What do you know?", "Help", "Help me."],
        "I can tell you a story. Ask me about a princess, a wolf, a ship or a garden.",
    ),
    (
        ["How are you?", "How are you today?"],
        "I am very well, thank you. Shall I tell you a story?",
    ),
    (
        ["Thank you.", "Thanks!", "Thank you very much.", "Thanks"],
        "You are very welcome. Come back whenever you want another story.",
    ),
    (["Goodbye", "Goodbye!", "Bye"], "Goodbye! I hope that you liked my stories."),
    (
        ["Are you a human?", "Are you alive?", "Are you real?"],
        "No, I am only a little model made of numbers, but the stories are as old as the hills.",
    ),
    (
        ["What is the moral of the story?", "What is the moral?"],
        "The moral is that kindness is never wasted, and that pride comes before a fall.",
    ),
    (["Where do you live?"], "I live in a small file, between two heavy books of fairy tales."),
    (
        ["What is the capital of France?", "What is two and two?", "What is the weather today?"],
        "I do not know. I have only read old stories, but I can tell you one.",
    ),
]


def quotes_normalize(text):
    """Straight quotes everywhere; books that speak in single quotes get double ones."""
    for old, new in (
        ("“", '"'),
        ("”", '"'),
        ("‘", "'"),
        ("’", "'"),
        ("—", "--"),
        ("–", "-"),
        ("…", "..."),
        ("\u00a0", " "),
    ):
        text = text.replace(old, new)
    if text.count(", '") + text.count(".' ") > text.count(', "') + text.count('." '):
        text = re.sub(r"(^|[\s(\-])'(?=[A-Za-z])", r'\1"', text, flags=re.M)
        text = re.sub(r"(?<=[,.!?;:\-])'", '"', text)
    return text


def paragraph_clean(text):
    """One line of prose without Markdown, or an empty string where it is not prose."""
    text = re.sub(r"\[[^\]]*\]|[_*`\\]|<[^>]*>", "", text)
    text = re.sub(r"\s*--+\s*", " -- ", re.sub(r"\s+", " ", text)).strip()
    text = "".join(c for c in text if c.isascii() or c.isalpha())
    is_prose = len(text) > 1 and text[-1] in ".!?\"':;,-)" and not text.isupper()
    return text if is_prose and not text.startswith(("#", "---", "THE END")) else ""


def sections_read(path):
    """List of (title, [paragraph]) of one book; verse and front matter are left out."""
    text = quotes_normalize(path.read_text(encoding="utf-8")).split("-------", 1)[-1]
    sections = []
    for part in re.split(r"^#{1,6}\s+", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        lines = [paragraph_clean(p) for p in re.split(r"\n\s*\n", body) if verse_is_not(p)]
        paragraphs = [p for p in lines if p]
        if sum(map(len, paragraphs)) > 150:
            sections.append((title.strip(), paragraphs))
    return sections


def verse_is_not(paragraph):
    lines = [line for line in paragraph.split("\n") if line.strip()]
    return len(lines) < 3 or sum(map(len, lines)) / len(lines) > 90


def book_find(folder, name):
    """Path of a book, in a flat folder of Author_-_Title.md or in the source's Author/Title.md."""
    for path in sorted(Path(folder).rglob("*.md")):
        flat = "_-_".join(path.relative_to(folder).parts)
        if name + ".md" in (flat.replace(" ", "_").replace("'", ""), path.name):
            return path
    raise SystemExit(f"{folder}: no {name}.md")


def corpus_read(folder):
    """Returns (list of (weight, sections), held-out text)."""
    books, heldout = [], []
    for name, weight in BOOKS.items():
        path = book_find(folder, name)
        sections = sections_read(path)
        if name in HELDOUT:
            title, n_chars_max = HELDOUT[name]
            held = [s for s in sections if s[0] == title]
            assert len(held) == 1, (path, title)
            heldout.append(text_cut(held[0][1], n_chars_max))
            sections = [s for s in sections if s[0] != title]
        books.append((weight, sections))
    return books, "\n\n".join(heldout) + "\n"


def text_cut(paragraphs, n_chars_max):
    kept, n_chars = [], 0
    for paragraph in paragraphs:
        if n_chars + len(paragraph) > n_chars_max:
            break
        kept.append(paragraph)
        n_chars += len(paragraph) + 2
    return "\n\n".join(kept)


def passages_cut(paragraphs, rand):
    """Groups paragraphs into passages of 40 to about 220 words."""
    passages, words, group = [], 0, []
    limit = rand.randint(40, 160)
    for paragraph in paragraphs:
        group.append(paragraph)
        words += len(paragraph.split())
        if words >= limit:
            passages.append("\n\n".join(group))
            words, group, limit = 0, [], rand.randint(40, 160)
    if words > 25:
        passages.append("\n\n".join(group))
    return [p for p in passages if len(p.split()) < 400]


def subjects_find(passage):
    """What a passage is about: nouns of the list and names, the frequent ones first."""
    counts = {}
    for word in re.findall(r"[A-Za-z]+", passage):
        if word.lower() in NOUNS:
            counts[word.lower()] = counts.get(word.lower(), 0) + 1
    for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", passage):
        if name.lower() not in NOUNS:
            counts[name] = counts.get(name, 0) + 1
    counts = {w: n for w, n in counts.items() if n > 1 or w.islower()}
    return sorted(counts, key=lambda w: (-counts[w], w))[:4]


def subject_phrase(word, rand):
    if word[0].isupper():
        return word
    if word in ("gold", "money", "children", "bread", "snow", "rain", "summer", "winter"):
        return word
    article = "an" if word[0] in "aeiou" else "a"
    return rand.choice(["the", article, article, article]) + " " + word


def request_make(passage, title, rand):
    """Returns (request, answer) for a passage."""
    sentences = re.split(r"(?<=[.!?])\s+", passage, maxsplit=1)
    kind = rand.random()
    is_speech = passage.startswith('"')
    if (kind < 0.2 or is_speech) and len(sentences) == 2 and 4 < len(sentences[0].split()) < 40:
        return sentences[0], sentences[1]
    if title and kind < 0.45:
        return rand.choice(REQUESTS_ABOUT).format(title), passage
    subjects = subjects_find(passage)
    if kind < 0.92 and subjects:
        chosen = [
            subject_phrase(s, rand)
            for s in rand.sample(subjects, min(len(subjects), rand.choice([1, 1, 2])))
        ]
        return rand.choice(REQUESTS_ABOUT).format(" and ".join(chosen)), passage
    return rand.choice(REQUESTS_ANY), passage


def title_phrase(title):
    """A tale's title as people write it, or "" for chapter numbers and the like."""
    if not title.isupper() or re.search(r"\d|CHAPTER|PART|BOOK|LETTER", title):
        return ""
    return re.sub(
        r"\b(The|A|An)\b",
        lambda m: m[0].lower(),
        title.capitalize()
        if len(title.split()) == 1
        else title.title().replace("'S ", "'s ").replace(" And ", " and ").replace(" In ", " in "),
    )


def turn(role, content):
    return [(True, role), (False, "\n" + content), (True, END), (False, "\n")]


def chat_make(passages, index, title, rand):
    """A chat that starts at passage `index`; returns (document, passages used)."""
    doc = [(True, BEGIN)]
    if rand.random() < 0.1:
        doc += turn(SYSTEM, rand.choice(SYSTEMS))
    if rand.random() < 0.08:
        asks, reply = rand.choice(TALK)
        doc += turn(USER, rand.choice(asks)) + turn(ASSISTANT, reply)
    request, answer = request_make(passages[index], title_phrase(title) if index == 0 else "", rand)
    doc += turn(USER, request) + turn(ASSISTANT, answer)
    used = 1
    while index + used < len(passages) and used < 3 and rand.random() < 0.3:
        doc += turn(USER, rand.choice(REQUESTS_ON)) + turn(ASSISTANT, passages[index + used])
        used += 1
    return doc, used


def talk_make(rand):
    doc = [(True, BEGIN)]
    for asks, reply in rand.sample(TALK, rand.choice([1, 1, 2])):
        doc += turn(USER, rand.choice(asks)) + turn(ASSISTANT, reply)
    return doc


def section_documents(title, paragraphs, rand):
    if rand.random() < 0.45:
        return [[(True, BEGIN), (False, "\n\n".join(paragraphs)), (True, END)]]
    passages, docs, i = passages_cut(paragraphs, rand), [], 0
    while i < len(passages):
        doc, used = chat_make(passages, i, title, rand)
        docs.append(doc)
        i += used
    return docs


def epoch_documents(books, rand):
    """All documents of one epoch in shuffled order."""
    docs = []
    for weight, sections in books:
        for title, paragraphs in sections:
            n = int(weight) + (rand.random() < weight - int(weight))
            for _ in range(n):
                docs += section_documents(title, paragraphs, rand)
    docs += [talk_make(rand) for _ in range(len(docs) // 25)]
    rand.shuffle(docs)
    return docs
