"""The texts that a compiled model is compared on: from one token to over-long, in many scripts.

They are ours, so that a comparison needs no download; what matters is that they are unlike each other, in
length, script and tokens.
"""

from __future__ import annotations

_SHORT = (
    "a", "I", "7", "?", "the", "cat", "hello", "Zürich", "是", "猫", "は", "안녕", "да", "نعم", "😀", "\u00a0", "x=1", "…",
    "naïve café", "C++", "Ωμέγα", "ไทย", "हिन्दी", "שלום",
)  # fmt: skip

_SENTENCES = (
    "How do I reset my password?",
    "The quick brown fox jumps over the lazy dog.",
    "A refund is paid within fourteen days of the return.",
    "Mount Everest is 8,849 metres high; K2 is 8,611.",
    "She sells sea shells by the sea shore, doesn't she?",
    "BREAKING NEWS: markets fall 3.2% after the announcement!!!",
    "to be, or not to be: that is the question",
    "The mitochondrion is the powerhouse of the cell.",
    "Call me at +44 20 7946 0958 or write to someone@example.org.",
    "Paris is the capital of France, and Lyon is not.",
    "the the the the the the the the",
    "Water boils at 100 °C at sea level.",
    "In 1969, Apollo 11 landed on the Moon.",
    "Please find attached the invoice for March.",
    "An apple a day keeps the doctor away.",
    "如何重置我的密码？",
    "今天天气很好，我们去公园散步。",
    "退款将在十四天内到账，请耐心等待。",
    "深度学习模型把文本变成向量，用来检索相似的内容。",
    "北京是中华人民共和国的首都。",
    "這是一段繁體中文的測試文字。",
    "人工智能正在改变世界，但也带来新的问题。",
    "パスワードを忘れた場合はどうすればいいですか。",
    "東京は日本の首都です。",
    "カタカナとひらがなと漢字が混ざった文です。",
    "비밀번호를 재설정하려면 어떻게 해야 하나요?",
    "서울은 대한민국의 수도이다.",
    "오늘 날씨가 정말 좋네요.",
    "كيف يمكنني إعادة تعيين كلمة المرور؟",
    "القاهرة هي عاصمة مصر.",
    "اللغة العربية تكتب من اليمين إلى اليسار.",
    "Как восстановить пароль?",
    "Москва — столица России.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "¿Cómo puedo restablecer mi contraseña?",
    "L'élève a oublié son cahier à l'école.",
    "Größe und Gewicht sind auf dem Etikett angegeben.",
    "Gdzie jest najbliższa stacja metra?",
    "Şifremi nasıl sıfırlarım?",
    "Làm thế nào để đặt lại mật khẩu?",
    "रीसेट करने के लिए यहाँ क्लिक करें।",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "איך מאפסים סיסמה?",
    "😀🎉🚀 launch day!!! 👍🏽👩‍👩‍👧‍👦",
    "def add(a: int, b: int) -> int:\n    return a + b",
    "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name;",
    "{\"id\": 17, \"tags\": [\"a\", \"b\"], \"ok\": true}",
    "<div class=\"note\"><p>Hello &amp; welcome</p></div>",
    "https://example.org/a/b?c=d&e=%20f#g",
    "for (int i = 0; i < n; ++i) { sum += v[i]; }",
    "$E = mc^2$ and $\\int_0^1 x^2 dx = 1/3$",
    "中文 mixed with English, 数字 123 and émojis 🙂.",
    "ＦＵＬＬ　ＷＩＤＴＨ　ｌｅｔｔｅｒｓ　１２３",
    "e\u0301 (combining) and é (composed)",
    "tabs\tand\nnew\r\nlines   and   spaces",
    "zero\u200bwidth and\u00adsoft hyphen",
    "ALL CAPITALS MEAN SHOUTING",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "qwrtpsdfg zxcvbnm 0x1F4A9 a1b2c3d4e5f6",
)  # fmt: skip

_PARAGRAPHS = (
    "A library lends books to anyone who lives nearby. You sign in, you take what you like, and you bring it back "
    "within three weeks; if somebody else waits for it, within one. Most people are on time. Those who are not pay "
    "a small fine, which buys new books, so that lateness has done more for the shelves than generosity has.",
    "To restart the pump, close the valve marked B, wait until the gauge reads zero, and press the green button for "
    "two seconds. If the light blinks, air is in the line: open the bleed screw a quarter turn until water comes.",
    "在一个安静的小镇上，有一家开了很多年的书店。店主每天早上把门打开，先给窗台上的花浇水，再把新到的书摆好。常来的客人都知道，"
    "如果找不到想要的书，只要告诉他，过几天就会有。后来网上买书越来越方便，来的人少了，可他还是每天开门。",
    "기차는 아침 일곱 시에 출발한다. 창밖으로 논과 산이 지나가고, 옆자리의 노인은 신문을 읽다가 잠이 든다. 역마다 몇 사람이 내리고 "
    "몇 사람이 탄다. 바다가 보이기 시작하면 모두 고개를 든다.",
    "昔々、ある村に、おじいさんとおばあさんが住んでいました。おじいさんは山へ芝刈りに、おばあさんは川へ洗濯に行きました。川上から"
    "大きな桃が流れてきて、おばあさんはそれを家に持って帰りました。",
    "Весной река выходит из берегов, и тогда до соседней деревни можно добраться только на лодке. Старики помнят год, "
    "когда вода поднялась до крыш; молодые не верят, но лодки держат наготове.",
    "في الصباح الباكر يفتح الخباز دكانه، وتنتشر رائحة الخبز في الشارع كله. يأتي الأطفال أولاً، ثم العمال، ثم من لا "
    "عمل لهم، وكل واحد منهم يعرف كم رغيفاً يحتاج.",
    "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.append(item)"
    "\n\n    def pop(self):\n        if not self.items:\n            raise IndexError('empty')\n        return self.items.pop(0)\n",
    "| year | rain (mm) | days |\n|------|-----------|------|\n| 2021 | 734.2 | 141 |\n| 2022 | 588.0 | 118 |\n| 2023 | 901.7 | 160 |\n"
    "Rain fell on fewer days in 2022 than in any year since 1996, and by a quarter less than usual.",
)  # fmt: skip

PROBES: tuple[str, ...] = (
    *_SHORT,
    *_SENTENCES,
    *_PARAGRAPHS,
    *(" ".join(_SENTENCES[start : start + 3]) for start in range(0, 45, 5)),
    *(_SENTENCES[i] + " " + _PARAGRAPHS[i % len(_PARAGRAPHS)] for i in range(0, 30, 6)),
)
"""Over a hundred texts of 1 to about 300 tokens."""


def long_probes(max_tokens: int) -> tuple[str, ...]:
    """Return texts of about a third of, just about, and several times a number of tokens."""
    # Some three characters a token for Latin script, one for Chinese: what is cut is cut by the tokenizer.
    latin, chinese = " ".join((*_SENTENCES[:15], _PARAGRAPHS[0])), _PARAGRAPHS[2] + _SENTENCES[18]
    return (
        _repeated(latin, max_tokens),
        _repeated(chinese, max_tokens * 2 // 3),
        _repeated(latin, max_tokens * 8),
    )


def _repeated(text: str, characters: int) -> str:
    return (text * (characters // len(text) + 1))[:characters]
