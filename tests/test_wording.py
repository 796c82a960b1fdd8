"""Remarks on wording hold on the sort of text that real data has, finished and broken off."""

import pytest

from scripts.pairs.similar import near
from scripts.pairs.wording import breaks_off, encoding_problem, entity, script

FINISHED = [
    "The past tense of 'swim' is 'swam'",
    "The chemical symbol for gold is Au",
    "Paris",
    "Paris 2024",
    "J. K. Rowling",
    "The author is J. K. Rowling",
    "The play was written by Dr. William Shaw of St. Andrews",
    "Positive",
    "Yes, it is",
    "Yes. It is",
    "That is what it is for",
    "You can log in",
    "A. Photosynthesis",
    "Option a",
    "I ate an apple. She ate a pear. He ate nothing!",
    "Three primary colours:\n- Red\n- Blue\n- Yellow",
    "1. Preheat the oven. Set it to 180 degrees.\n2. Mix the batter. Do not overmix\n3. Bake it",
    "Synonyms for happy:\n1. joyful\n2. content\n3. pleased",
    "* **Speed:** It is fast. Really fast.\n* **Price:** It is cheap. Nothing beats free software",
    "Use a loop:\n\n```python\nfor x in y:\n    print(x)\n```",
    "x = 1;\ny = 2;",
    "SELECT name FROM users WHERE age > 30;",
    "def f(x):\n    return x + 1",
    "for x in y:\n    print(x)\n    total += x",
    "Run this:\n\n    make install",
    "#include <stdio.h>\nint main() { return 0; }",
    '{"name": "Ada", "born": 1815}',
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "E = mc^2",
    "The answer is 42",
    "The rule says so. It was made in 1999. More at https://example.org/rules",
    "It is short. It is simple. Write to help@example.org",
    "We met twice. It went well. I hope this helps",
    "You did it. It was hard. Good luck with the rest",
    "Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you",
    "Dear Ms Hill,\n\nThank you for the visit. We enjoyed it.\n\nBest regards,\nJoe Miller",
    "Dear Ms Hill,\n\nThank you for the visit. We enjoyed it.\n\nSincerely,",
    "He turned and said, “I am leaving.”",
    "That is great! 🎉",
    "Be yourself; everyone else is taken.\n\n- Oscar Wilde",
    "**Conclusion**\nThe trade grew. Prices fell.\n\nSource: World Atlas",
    "#summer #holiday #beach",
    "The train leaves at 5 p.m. from London",
    "Mr. Smith met Mrs. Brown",
    "a) true b) false",
    "北京是中国的首都",
    "北京是中国的首都。",
    "1. 多喝水\n2. 早睡早起\n3. 适量运动",
    "感冒通常由病毒引起。注意休息，多喝水。如果发烧不退，应尽快就医。希望对你有帮助",
    "他说：“我走了。”",
    "これは本です。",
    "Привет! Как дела?",
    "Это книга",
    "Bonjour, je m'appelle Luc",
    "Title: A Walk in the Park",
    "The cat sat on the mat (and slept)",
    "Great idea :)",
    "It depends on who you ask…",
    "- Flour: 200 g\n- Milk: 300 ml\n- Eggs: 2",
    "Step 1: Open the lid\nStep 2: Pour the water in\nStep 3: Close the lid",
    "$$x = \\frac{1}{2}$$",
    "Thus the answer is **B**",
    "Happy Birthday to you, dear Anna",
]
BROKEN = [
    "It is because of",
    "First, second,",
    "The capital of France is Paris, and the",
    "There are three reasons for this. The first is price. The second is that people of all ag",
    "Water boils at 100 degrees. The pressure matters as well. On a mountain it boils earlier bec",
    "Photosynthesis turns light into sugar. It happens in the leaves.\n\n"
    "Plants need water for this as well. Without it they",
    "Here are the steps:\n1. Mix the flour and the",
    "Here is the recipe:",
    "To install it, do the following:\n\n1. Open the terminal\n2. Type the command and",
    "Use a loop:\n\n```python\nfor x in y:\n    print(x",
    "I would choose the first one because",
    "He studied at several schools, which",
    "The colours are red, green, and",
    "The method is well known and inter-",
    "北京是中国的首都，也是",
    "北京是中国的首都，人口众多，",
    "感冒通常由病毒引起。注意休息，多喝水。同时要注意保持室内的",
    "感冒通常由病毒引起。注意休息。常见的症状包括：",
    "这种药物可以缓解疼痛。但是长期使用会有副作用。建议患者在医生指导下使用，因为",
    "机器学习是人工智能的一个分支。它使用数据来训练模型。训练好的模型可以用来预测未来的趋势和",
    "人工智能有很多应用。它可以帮助医生诊断疾病。它也可以帮助老师批改作业，并且可以提高学",
    "The war began in 1914. It ended in 1918. Many of the soldiers who came home were unable to fi",
]
QUIET_ABOUT = 1  # of BROKEN: what a rule that keeps silent on FINISHED may miss


def test_finished_answers_of_every_shape_are_not_called_broken_off():
    assert [text for text in FINISHED if breaks_off(text)] == []


def test_nearly_all_broken_answers_are_found():
    missed = [text for text in BROKEN if not breaks_off(text)]
    assert len(missed) <= QUIET_ABOUT, missed


def test_the_cure_of_wrong_characters_fits_their_cause():
    for text, cure in {
        "CafÃ©": "read the source as UTF-8",
        "Caf\ufffd": "its own encoding",
        "so \ud83d": "cut the source between characters",
        "\ufeffYes": "a byte order mark; strip it",
        "No\x07": "a control character; strip it",
    }.items():
        assert cure in encoding_problem(text)
    assert encoding_problem("Ã, Â and â are letters, as in pão. 日本語 😀 “quoted”") is None
    assert encoding_problem("\x07 then CafÃ©").startswith("'\\x07' at character 0")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tom &amp; Jerry", "&amp;"),
        ("It&#39;s so", "&#39;"),
        ("It&#x27;s so", "&#x27;"),
        ("a &lt; b", "&lt;"),
        ("Write `&amp;` for an ampersand", None),
        ("In HTML: <p>Tom &amp; Jerry</p>", None),
        ("```html\n&nbsp;\n```", None),
        ("AT&T; R&D", None),
        ("x &y; z", None),
    ],
)
def test_entities_are_found_where_they_are_no_subject(text, found):
    assert entity(text) == found


def test_the_script_of_a_text_is_that_of_most_of_its_letters():
    assert script("The quick brown fox jumps.") == "Latin"
    assert script("今天天气很好，我们一起去公园散步吧，那里的花都开了。") == "Chinese"
    assert script("今日はとても天気がいいので、公園へ散歩に行きましょう。") == "Japanese kana"
    assert script("Сегодня очень хорошая погода") == "Cyrillic"
    assert script("Short") is None
    assert script("In Python 语言里 print 函数可以输出各种各样的内容") is None  # mixed


def test_near_copies_are_found_and_like_questions_are_not():
    text = "Air scatters blue light far more than red light, and so the sky looks blue by day"
    texts = [
        "What is the highest mountain of the whole country of France?",
        "What is the highest mountain of the whole country of Spain?",
        text,
        text.replace("far", "much") + ", as it does for us all here on this planet",
        text + " for us",
        "天空看起来是蓝色的，因为空气散射蓝光比红光更多",
        "天空看起来是蓝色的，因为空气散射蓝光比红光更多。",
        "Yes", "Yes",
    ]  # fmt: skip
    assert list(near(texts)) == [(4, 2), (6, 5)]
    assert list(near(texts[4:5], texts[:4])) == [(0, 2)]
