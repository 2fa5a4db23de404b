"""Texts in many scripts for tokenizer tests: seeded, so that every run and every machine sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Enough text of each script that random cuts of it are not always the same words.
SCRIPTS = {
    "latin": "The quick fox can't jump; it'll sit. Ångström's naïve façade, Đặng Thị Huệ, Straße, İstanbul ǅ",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак, Ђорђе, Қазақстан",
    "greek": "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί· ᾧ, ἄνθρωπος, Ὀδυσσεύς",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم، ١٢٣٤٥ مُحَمَّد ﷺ فارسی گچپژ",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה, שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों का सर्वनाश १२३ क्षत्रिय ज्ञान",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "chinese": "我能吞下玻璃而不伤身体。機器學習的模型，𠮷野家、〇一二三",
    "japanese": "いろはにほへと ちりぬるを、カタカナとﾊﾝｶｸ。東京都は１２３番地です",
    "hangul": "다람쥐 헌 쳇바퀴에 타고파. 한국어 처리, ᄒᆞᆫ글",
    "others": "ქართული ენა ҵ Հայերեն አማርኛ தமிழ் বাংলা ភាសាខ្មែរ ᏣᎳᎩ 𐌰𐌱𐌲 𓀀𓁐 ⵜⴰⵎⴰⵣⵉⵖⵜ",
}
EMOJI = ["😀", "👍🏽", "🇫🇷", "☃", "🫠", "1\ufe0f\u20e3", "❤\ufe0f"]
EMOJI += ["👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🤦\u200d♀\ufe0f"]
MARKS = ["e\u0301", "A\u030a", "o\u0308\u0323", "क\u093c", "\u0301", "ﬁ", "\u1e9b\u0323", "Å", "\u212b", "か\u3099"]
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\v", "\f"]
SPACES += ["\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff"]
CONTROLS = ["\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85"]
CONTROLS += ["\u2028", "\u202e", "\u00ad", "\ufffd", "\ufffe", "\U0010ffff"]
CODE = [
    "def f(x: int) -> str:\n    return f'{x:>10}'  # no",
    "for(int i=0;i<10;++i){a[i]*=2;}",
    '<div class="a"><b>x</b></div>\n\t<br/>',
    "SELECT * FROM t WHERE a='b' AND c<>3;",
    "https://example.org/a?b=c&d=%20#e",
    "x = {'k': [1, 2.5e-3, None]}\n\n\n",
    "\\begin{align} a &= b^{2} \\end{align}",
    "if (a && !b || c) => d::<T>()?;",
    "    \t  mixed\n        indent\n",
]
WORDS = ["I'm", "you'LL", "we've", "'s", "it’s", "don't", "HTTP", "eBay", "foo_bar", "Camel", "a", "…", "¿qué?", "№5"]
# What looks like vocabulary: spellings of bytes, of spaces, of special tokens half written.
TRAPS = ["▁", "▁▁", "▁the", "Ġ", "Ġthe", "Ċ", "<0x41>", "<0x0A>", "<0xE2>", "<s>", "</s>", "<|im_st", "<unused", "<"]


def corpus(count: int, seed: int = 0, special: Sequence[str] = ()) -> list[str]:
    """`count` strings: first every building block by itself and the known trouble makers, then random mixtures.

    `special` are texts of special tokens, to stand in the middle of other text.
    """
    rng = random.Random(seed)
    blocks = [*SCRIPTS.values(), *EMOJI, *MARKS, *SPACES, *CONTROLS, *CODE, *WORDS, *TRAPS, *special]
    runs = [char * length for char in " \n\ta1▁-=" for length in (2, 3, 4, 7, 16, 31, 32, 33, 70)]
    edges = ["", " a", "  a", "a ", "a  ", "\na", "a\n", " \n ", "a" * 300, "0123456789" * 7]
    edges += ["12 345 6789 3.14 1e10 ²½Ⅷ٣"]
    edges += [left + token + right for token in special for left in ("", " ", "a") for right in ("", " ", "b", "\n")]
    texts = blocks + runs + edges
    while len(texts) < count:
        texts.append("".join(_piece(rng, special) for _ in range(rng.randint(1, 12))))
    return texts[:count]


def _piece(rng: random.Random, special: Sequence[str]) -> str:
    kind = rng.randrange(12)
    if kind < 4:
        text = rng.choice(list(SCRIPTS.values()))
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 24)]
    if kind == 4:
        return rng.choice(SPACES) * rng.randint(1, 4)
    if kind == 5:
        return str(rng.randrange(10 ** rng.randint(1, 12)))
    if kind == 6:
        return rng.choice(CODE)
    if kind == 7:
        return "".join(chr(_code_point(rng)) for _ in range(rng.randint(1, 4)))
    if kind == 8 and special:
        return rng.choice(list(special))
    source = rng.choice([EMOJI, MARKS, CONTROLS, WORDS, TRAPS, SPACES])
    return rng.choice(source) + rng.choice(["", " ", ""])


def _code_point(rng: random.Random) -> int:
    """Any code point that can stand in text: all planes, no surrogates."""
    while 0xD800 <= (point := rng.choice([rng.randrange(0x3000), rng.randrange(0x110000)])) < 0xE000:
        pass
    return point
