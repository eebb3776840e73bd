"""The words that the requests of the grammar name: many, so that a model learns to copy them.

With a few names a model learns the names; with hundreds, each seen rarely, it pays to look them up
in the request.
"""

# ruff: noqa: SIM905 (words are read and counted more easily as text than as a list)

from __future__ import annotations

PEOPLE = """
Aaron Abel Ada Adam Adele Agnes Ahmed Aiko Aisha Alan Albert Alice Alma Amir Amy Ana Andrea Andrew
Anika Anna Anton Arthur Asha Astrid Aya Barbara Beatrice Bella Ben Bianca Bob Boris Brenda Brian
Bruno Camille Carla Carlos Cecilia Chen Chloe Claire Clara Clive Colin Cora Daisy Dana Daniel Daphne
David Dean Deepa Diana Diego Dmitri Dora Doris Edith Edwin Elena Eli Elias Elise Ella Emil Emma Eric
Erika Esther Ethan Eva Faith Farah Farid Fatima Felix Fiona Flora Frank Freya Fritz Gabriel Gemma
George Gina Giulia Gloria Grace Greta Gustav Hana Hannah Harry Hassan Hazel Heidi Helen Henry Hilda
Hugo Ian Ida Ilse Imran Ines Ingrid Irene Iris Isaac Ivan Ivy Jack Jacob Jamal Jane Jasmine Jean
Jerome Joan Joel John Jonas Jorge Joseph Joyce Judith Julia Julian June Kai Karen Karim Karl Kate
Keiko Kevin Kira Klaus Kofi Kurt Lars Laura Leah Leila Leo Leon Lena Liam Lily Linda Lisa Livia
Louis Lucas Lucy Luna Mabel Magda Malik Marco Maria Marie Marta Martin Maya Megan Mei Mia Miles
Mina Mira Mona Monica Nadia Naomi Nasir Nell Nina Noah Nora Odette Olaf Olga Olive Omar Oscar Otto
Paola Paul Paula Pedro Peter Petra Philip Pia Priya Rachel Rafael Ralph Ravi Rebecca Rita Robert
Rosa Rose Ruby Ruth Sally Sam Sandra Sara Selma Sergio Silvia Simon Sofia Sonia Stella Stefan Sven
Tariq Teresa Thea Theo Thomas Tina Tomas Ulla Uma Uri Valerie Vera Victor Viola Wanda Walter Wendy
William Xavier Yara Yasmin Yusuf Zara Zoe
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = [f"{hour} {half}" for half in ("am", "pm") for hour in range(1, 13)]
TIMES += [f"{hour}:{part} {half}" for half in ("am", "pm") for hour in range(6, 12)
          for part in (15, 30, 45)]  # fmt: skip
TIMES += ["noon", "midnight"]
CITIES = """
Accra Algiers Amsterdam Ankara Antwerp Athens Atlanta Auckland Austin Baghdad Baltimore Bangkok
Barcelona Basel Beijing Beirut Belfast Belgrade Bergen Berlin Bern Bilbao Bogota Bologna Bonn Boston
Bremen Bristol Brussels Bucharest Budapest Cairo Calgary Canberra Caracas Cardiff Chicago Cologne
Copenhagen Cork Dakar Dallas Damascus Delhi Denver Detroit Doha Dresden Dublin Durban Edinburgh
Florence Frankfurt Galway Geneva Genoa Ghent Glasgow Granada Graz Hamburg Hanoi Harare Havana
Helsinki Houston Istanbul Izmir Jakarta Kabul Kampala Karachi Kingston Krakow Kyiv Kyoto Lagos
Lahore Leeds Leipzig Lima Lisbon Liverpool London Lusaka Lyon Madrid Malaga Manchester Manila
Marseille Melbourne Memphis Miami Milan Minsk Montreal Mumbai Munich Nagoya Nairobi Nantes Naples
Nashville Nice Osaka Oslo Ottawa Oxford Palermo Paris Perth Phoenix Pisa Porto Portland Prague
Quebec Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle Seoul Seville Shanghai
Sofia Split Stockholm Stuttgart Sydney Tallinn Tampa Tehran Tokyo Toronto Toulouse Trieste Tripoli
Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw Wellington York Zagreb
Zurich
""".split()
TOPICS = (
    "the budget,the picnic,the garden,the new plan,the trip,the report,the meeting,the party,"
    "the invoice,the house,the concert,the contract,the dinner,the exam,the wedding,the parcel,"
    "the lease,the car,the bicycle,the keys,the tickets,the piano,the roof,the boat,the dog,"
    "the neighbours,the school play,the survey,the auction,the lecture,the recipe,the photos,"
    "the insurance,the holiday,the interview,the match,the museum,the newsletter,the order,"
    "the painting,the payment,the permit,the phone bill,the prize,the project,the proposal,"
    "the refund,the rehearsal,the repair,the rota,the schedule,the shelves,the speech,the tax form,"
    "the thesis,the tournament,the trailer,the visa,the visit,the workshop"
).split(",")
ITEMS = """
almonds apples apricots bacon bananas basil batteries beans beetroot bread broccoli bulbs butter
cabbage candles carrots cereal charcoal cheese cherries chocolate cinnamon coffee cookies corn
crisps cucumbers dates eggs envelopes figs flour foil garlic ginger grapes ham honey jam juice
ketchup leeks lemons lentils lettuce limes mangoes matches milk mint mushrooms mustard napkins nuts
oats olives onions oranges paper parsley pasta peaches pears peas pepper pickles plums popcorn
potatoes pumpkin radishes raisins rice rolls sage salmon salt sardines soap spinach sponges stamps
sugar syrup tape tea thyme tofu tomatoes toothpaste towels tuna turnips vanilla vinegar walnuts
water yeast yoghurt
""".split()
LISTS = """
shopping packing party weekend kitchen office camping holiday birthday breakfast garage garden
market picnic school summer travel winter workshop baking
""".split()
DEVICES = """
lamp heater fan radio oven television alarm dishwasher printer camera blender boiler computer dryer
freezer humidifier kettle microwave pump scanner speaker sprinkler stove toaster vacuum
""".split()
ROOMS = (
    "kitchen,bedroom,office,garage,hall,cellar,living room,bathroom,attic,balcony,basement,"
    "conservatory,dining room,garden,guest room,laundry,library,loft,nursery,pantry,porch,shed,"
    "stairway,studio,study,workshop"
).split(",")
MUSIC = """
ambient bluegrass blues country dance disco drum flamenco folk funk gospel indie jazz metal opera
piano pop punk rap reggae rock salsa samba soul swing tango techno waltz
""".split()
PLACES = (
    "Luigi's,The Oak,Blue Fig,Casa Sol,Red Lantern,The Harbour,Old Mill,Green Door,Adria,Anchor,"
    "Black Swan,Bluebell,Bonsai,Carmen's,Cedar House,Chez Paul,City Grill,Copper Pot,Delphi,Eagle,"
    "Fern Hill,Fish Bar,Garden Gate,Golden Bowl,Half Moon,Hannah's,Ivy Court,Jade Garden,"
    "King's Arms,La Piazza,Lighthouse,Lotus,Maple Tree,Market Hall,Mill House,Molly's,Moonlight,"
    "North Star,Olive Branch,Orchid,Osteria,Palm Court,Peacock,Pepper Mill,Pine Lodge,Red Lion,"
    "River Cafe,Rosa's,Saffron,Sea Breeze,Silver Spoon,Stone Bridge,Sunflower,Tavola,The Bell,"
    "The Crown,The Orchard,The Vine,Thistle,Trattoria Roma,Walnut Tree,White Horse,Wild Goose,Zen"
).split(",")
SIZES = "two three four five six seven eight nine ten eleven twelve".split()
MINUTES = [str(number) for number in range(2, 100)]
SKIES = "sunny rainy cloudy windy cold mild".split()
EVERY = [
    *PEOPLE, *DAYS, *TIMES, *CITIES, *TOPICS, *ITEMS, *LISTS, *DEVICES, *ROOMS, *MUSIC, *PLACES,
    *SIZES, *MINUTES,
]  # fmt: skip
