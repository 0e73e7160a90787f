"""The texts among which neighbours are counted: a few hundred, in many languages, by topic.

They are the project's own and lie beside this file. Each topic holds ten texts of a few words to a paragraph, in
English, Chinese and others, so that a text has neighbours that it should have. They are neither the probes
(`probes.py`), which are chosen to be odd, nor texts that anything is calibrated on.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("data") / "corpus.json"
MIN_TOPICS = 4
"""However slow a model is: with fewer, ten neighbours would be a large part of all texts."""


@cache
def topics() -> dict[str, tuple[str, ...]]:
    """Return all texts, by topic, in the order of the file."""
    return {name: tuple(texts) for name, texts in json.loads(_FILE.read_text(encoding="utf-8")).items()}


def corpus(share: float = 1.0) -> tuple[str, ...]:
    """Return all texts, or about a share of them (0 to 1): whole topics, evenly chosen, at least `MIN_TOPICS`.

    Topics stay whole so that a text keeps the neighbours that it should have, and a figure over fewer texts means
    the same.
    """
    every = list(topics().values())
    count = min(len(every), max(MIN_TOPICS, int(share * len(every))))
    return tuple(text for i in range(count) for text in every[i * len(every) // count])


@cache
def corpus_digest() -> str:
    """Return a sha256 over the texts, in hex: other texts, other figures."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()


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


_ENGLISH = (
    "kettle", "second-hand bicycle", "opening hours", "tax return 2024", "who wrote Middlemarch", "cheap flights",
    "symptoms of iron deficiency", "best way to sharpen a kitchen knife", "error 0x80070057", "left or right?",
    "My parcel says delivered, but nothing has arrived.",
    "The committee postponed its vote until after the summer recess.",
    "Sourdough needs flour, water, salt and patience, mostly patience.",
    "Which of these two plans includes roaming in Switzerland?",
    "Interest is calculated daily and charged on the last working day of each month.",
    "The bridge was closed to lorries after an inspection found cracks in two of its cables.",
    "He laughed, put on his hat, and walked out into the rain without another word.",
    "Enzymes lower the activation energy of a reaction without being used up.",
    "I loved the first half, but the ending felt rushed and the dialogue was wooden. Two stars.",
    "Turn off the mains before you remove the cover.",
    "Quarterly revenue rose 4.6% to $1.28 billion, helped by a weaker dollar.",
    "Does the warranty cover water damage?",
    "The comet will be visible to the naked eye shortly before dawn.",
    "Tenants must give two months' notice in writing.",
    "A binary search halves the interval at every step.",
    "Penguins cannot fly, yet under water they seem to do little else.",
    "The defendant denies all charges and will appeal.",
    "Wear gloves: the sap irritates the skin.",
    "Our meeting moved from Tuesday 10:30 to Thursday 9:00, same room.",
    "Vaccination protects the person and, by slowing the spread, everyone around.",
    "Mix the paint well, apply two thin coats, and let it dry overnight.",
    "There is no evidence that the manuscript was ever in Vienna.",
    "Can I run this on a machine without a graphics card?",
    "The goalkeeper saved two penalties and was carried off the pitch by his team-mates.",
    "Glass is neither a liquid nor a crystal.",
    "Subscribe now & save 20% (terms apply).",
    "The old lighthouse has been automatic since 1986, but somebody still paints it every spring.",
    "Compare the nutritional values of lentils, chickpeas and black beans.",
    "In the event of fire, leave the building by the nearest exit and do not use the lifts.",
    "The novel is narrated by a dog, which is less tiresome than it sounds.",
)  # fmt: skip

_CHINESE = (
    "充电器", "附近的药店", "怎么开发票", "机票改签要收手续费吗？",
    "这款手机的电池可以用一整天。",
    "请在收到货物后七天内检查外观是否完好。",
    "长城始建于春秋战国时期，历代多次修筑。",
    "他推开门，看见桌上放着一封没有署名的信。",
    "机器翻译的质量在最近几年有了很大的提高。",
    "根据合同第三条，乙方应当按月支付租金。",
    "孩子发烧到三十九度，应该先去看医生。",
    "把鸡蛋打散，加少许盐，用小火慢慢炒熟。",
    "央行宣布下调存款准备金率0.5个百分点。",
    "高鐵從台北到高雄大約需要一個半小時。",
    "这部电影画面很美，可是情节太拖沓了。",
    "数据库连接失败，请检查用户名和密码是否正确。",
)  # fmt: skip

_JAPANESE = (
    "領収書", "駅から徒歩五分", "返品はできますか。",
    "この薬は食後に一日三回飲んでください。",
    "台風の影響で、午後の便はすべて欠航になりました。",
    "彼女は窓を開けて、雪が降っているのに気づいた。",
    "会議は来週の水曜日に延期されました。",
    "味噌汁に豆腐とわかめを入れます。",
    "ソフトウェアを更新してから再起動してください。",
    "人口の減少は地方の町で特に深刻である。",
)  # fmt: skip

_KOREAN = (
    "영수증", "배송 조회", "환불은 며칠이나 걸리나요?",
    "회의가 다음 주 목요일로 미뤄졌습니다.",
    "김치는 배추와 고춧가루로 만든다.",
    "그는 아무 말 없이 편지를 접어 주머니에 넣었다.",
    "정부는 새로운 주택 정책을 발표했다.",
    "프로그램을 설치하기 전에 백업을 해 두세요.",
    "이 식당은 조용하고 음식도 맛있어요.",
)  # fmt: skip

_EUROPEAN = (
    "Fahrplanauskunft", "Wie kündige ich meinen Vertrag?",
    "Der Zug nach Leipzig fällt heute wegen einer Signalstörung aus.",
    "Bitte senden Sie uns die unterschriebenen Unterlagen bis zum 15. Mai zurück.",
    "Die Wirksamkeit des Mittels wurde in drei Studien untersucht.",
    "Wer zuletzt lacht, lacht am besten.",
    "horaires d'ouverture", "Où puis-je acheter un billet de tram ?",
    "Le gouvernement a présenté un projet de loi sur l'énergie.",
    "Faites revenir les oignons dans le beurre pendant dix minutes.",
    "Elle relut la lettre deux fois avant de la jeter au feu.",
    "Ce produit n'est plus disponible dans notre magasin.",
    "factura electrónica", "¿A qué hora sale el último autobús?",
    "El paciente presenta fiebre y dolor de garganta desde hace tres días.",
    "La biblioteca cierra los domingos y los días festivos.",
    "Los precios subieron un dos por ciento en el último trimestre.",
    "orario dei treni", "Il museo conserva più di mille disegni del Settecento.",
    "Não consigo entrar na minha conta desde ontem.",
    "De vergadering begint om half tien in zaal 4.",
    "Snön låg djup och vägen var avstängd i två dagar.",
    "расписание электричек", "Сколько стоит доставка в Казань?",
    "Температура ночью опустится до минус двадцати градусов.",
    "Учёные обнаружили новый вид жуков в тропическом лесу.",
    "Он долго искал ключи, а они лежали в кармане пальто.",
    "Перед установкой обновления сохраните все открытые документы.",
    "Kütüphane hafta sonu kapalı mı?", "Wyniki badań będą dostępne w piątek.",
)  # fmt: skip

_SOUTHERN = (
    "مواعيد القطار", "كم تبلغ تكلفة الشحن إلى جدة؟",
    "أعلنت الوزارة نتائج الامتحانات صباح اليوم.",
    "يذوب السكر في الماء الساخن أسرع من البارد.",
    "كان البحر هادئاً حين أبحرت السفينة.",
    "لا يمكن استرجاع المبلغ بعد مرور ثلاثين يوماً.",
    "रेल समय सारणी", "मेरा पार्सल कब तक पहुँचेगा?",
    "किसानों ने इस साल गेहूँ की अच्छी फसल काटी।",
    "बारिश के कारण मैच रद्द कर दिया गया।",
    "कृपया फ़ॉर्म भरकर काउंटर पर जमा करें।",
    "ร้านนี้เปิดกี่โมง", "Thời tiết cuối tuần này thế nào?", "Harga beras naik menjelang hari raya.",
)  # fmt: skip

_CODE = (
    "git rebase --interactive HEAD~3",
    "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    "const total = items.reduce((sum, item) => sum + item.price, 0);",
    "docker run --rm -p 8080:80 nginx:alpine",
    "UPDATE orders SET state = 'paid' WHERE id IN (SELECT order_id FROM payments);",
    "fn main() { let names = vec![\"a\", \"b\"]; println!(\"{:?}\", names); }",
    "import numpy as np\n\ndef softmax(x):\n    e = np.exp(x - x.max(axis=-1, keepdims=True))\n    return e / e.sum(axis=-1, keepdims=True)",
    "server:\n  port: 9090\n  hosts:\n    - one.example.net\n    - two.example.net\n",
    "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 42); return 0; }",
    "\\begin{equation} \\nabla \\cdot \\mathbf{B} = 0 \\end{equation}",
)  # fmt: skip

_LONG = (
    "The orchard behind the school was planted by a headmaster who believed that children who had grafted a tree "
    "would think twice before breaking a branch. Ninety years on there are forty kinds of apple in it, some of "
    "which grow nowhere else, and the oldest pupils still spend a morning each winter learning to use the knife. "
    "Whether they think twice is not recorded; the trees, at any rate, are in good order.",
    "To change the filter, switch the machine off at the wall and let it cool for at least half an hour. Lift the "
    "lid, press both clips inwards, and pull the cartridge straight up. Rinse the new one under the tap for a "
    "minute before you push it in until it clicks. Run two tanks of clear water through and pour them away. The "
    "indicator goes out by itself; if it does not, hold the button for ten seconds.",
    "Abstract. We study how the length of a query affects the ranking of documents when both are represented as "
    "vectors. In four collections, queries of fewer than three words lose between five and eleven points of "
    "precision, most of which can be recovered by expanding them with terms from the first results. The effect "
    "is smaller for models that were trained on pairs of questions and answers. We release the code and the runs.",
    "This agreement is made between the supplier and the customer named overleaf. The supplier shall deliver the "
    "goods within the period stated in the order. If delivery is delayed by more than thirty days for reasons "
    "within the supplier's control, the customer may withdraw from the agreement in writing and is entitled to "
    "the return of any sum already paid. Neither party is liable for delays caused by strikes, floods or war.",
    "去年秋天，我们一家人开车去了西北。路很长，车窗外先是麦田，后来是戈壁，最后只剩下天和云。父亲一路上讲他年轻时候的事，"
    "说那时候从县城到省城要走两天，夜里就睡在卡车上。母亲听着，不时纠正他记错的地方。到敦煌的那天傍晚，风停了，沙山的影子"
    "一点一点地爬过来，谁也没有说话。",
    "本公司重视用户的个人信息保护。我们仅在提供服务所必需的范围内收集信息，包括账号、联系方式以及设备标识。未经您的同意，我们"
    "不会向第三方提供上述信息，法律法规另有规定的除外。您可以随时在设置中查询、更正或者删除您的个人信息，也可以注销账号。",
    "図書館の二階には、誰も座らない机がひとつある。窓に近く、明るくて、椅子も悪くないのに、学生たちはなぜか避けて通る。司書に"
    "尋ねると、昔そこで毎日辞書を読んでいた老人がいたのだという。亡くなってからも、しばらくは誰かが花を置いていたそうだ。",
    "Im Winter fährt die Fähre nur zweimal am Tag, und wer die zweite verpasst, muss auf der Insel übernachten. Es "
    "gibt dafür ein einziges Gasthaus mit sechs Zimmern, von denen vier geheizt werden können. Die Wirtin kocht, "
    "was da ist, und fragt nicht, wer man ist. Am Morgen steht der Kaffee auf dem Ofen, und durch das Fenster "
    "sieht man schon von weitem, ob das Schiff kommt.",
    "Понедельник начался с того, что в доме отключили воду. Соседи выходили на лестницу с вёдрами, ругали "
    "управляющую компанию и заодно рассказывали друг другу новости. К обеду воду дали, но расходиться никому не "
    "хотелось, и кто-то вынес самовар.",
    "| part | material | weight (g) | price |\n|---|---|---|---|\n| frame | aluminium | 1,420 | 310.00 |\n| fork | "
    "carbon | 510 | 189.90 |\n| saddle | leather | 480 | 75.50 |\nAll weights were measured by us, with bolts, and "
    "may differ by three per cent from one piece to the next; prices are without tax.",
)

CALIBRATION: tuple[str, ...] = (
    *_ENGLISH,
    *_CHINESE,
    *_JAPANESE,
    *_KOREAN,
    *_EUROPEAN,
    *_SOUTHERN,
    *_CODE,
    *_LONG,
    # Neighbouring sentences of several languages together: lengths between those above.
    *(" ".join(_ENGLISH[start : start + 5]) for start in range(10, 40, 5)),
    *("".join(_CHINESE[start : start + 4]) for start in range(4, 16, 4)),
    *(" ".join(_EUROPEAN[start : start + 4]) for start in range(2, 30, 7)),
)
"""Well over a hundred texts of 1 to about 150 tokens."""
