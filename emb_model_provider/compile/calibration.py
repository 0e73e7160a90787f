"""The texts that show a quantizer what a model's activations look like.

They are ours, so that quantizing needs no download, and none of them is among the texts that a model is measured
on: a figure from the texts it was tuned to would be worth nothing.
"""

from __future__ import annotations

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
