"""The words of the shopping-list dialogues: items by category, and small talk to forget them in.

Everything here was written for kvsieve. Items of one category stand in for each other as answer options, so a model
that only knows what a spice is, and not which one was asked for, gains nothing.
"""

from __future__ import annotations

__all__ = ["FILLERS", "ITEMS"]

ITEMS: dict[str, tuple[str, ...]] = {
    "bread": ("rye crispbread", "garlic naan", "raisin bagels", "corn tortillas", "potato scones"),
    "cheese": ("goat cheddar", "blue stilton", "aged manchego", "soft taleggio", "fresh ricotta"),
    "drink": ("oat milk", "pear cider", "tomato juice", "coconut water", "peppermint tea"),
    "fish": ("smoked trout", "pickled herring", "canned sardines", "salted anchovies", "fresh squid"),
    "herb": ("lemon thyme", "purple basil", "curly parsley", "dried oregano", "garden chervil"),
    "spice": ("green cardamom", "star anise", "juniper berries", "caraway seeds", "ground turmeric"),
    "sweet": ("almond nougat", "lemon sherbet", "salted toffee", "hazelnut praline", "apple strudel"),
    "vegetable": ("fennel bulbs", "sweet parsnips", "white asparagus", "butternut squash", "romanesco broccoli"),
}

FILLERS: tuple[tuple[str, str], ...] = (
    (
        "Why does the moon seem to change its shape over a month?",
        "The sun always lights one half of the moon. As the moon travels around us we see that bright half from "
        "different sides, first a thin crescent, then a full disc, and then a crescent again.",
    ),
    (
        "How do I keep my bicycle chain from rusting in the winter?",
        "Wipe it dry after every wet ride, brush the dirt out of the links once a week, and put one drop of oil on "
        "each roller. Let the oil sit overnight and wipe away what is left on the outside.",
    ),
    (
        "What is the difference between a lake and a pond?",
        "There is no strict border. People usually call it a pond when the water is shallow enough for sunlight to "
        "reach the bottom everywhere, and a lake when the deep parts stay dark and cold.",
    ),
    (
        "Can you explain what a budget is to a child?",
        "A budget is a plan for your pocket money. You decide before you go out how much of it is for the cinema, how "
        "much is for a present, and how much you will keep for next week.",
    ),
    (
        "Why do cats sleep for so much of the day?",
        "Cats are hunters, and hunting takes short bursts of a lot of energy. Between those bursts they save their "
        "strength, so a house cat may doze for twelve to sixteen hours without being ill.",
    ),
    (
        "What should I do first when I move into a new flat?",
        "Find the tap that shuts off the water and the box with the fuses. Then take pictures of every room before "
        "you carry anything in, and write your name on the letter box.",
    ),
    (
        "How did people tell the time before there were clocks?",
        "They watched the shadow of a stick in the sun, they burned candles with marks on them, and they let water or "
        "sand run slowly from one vessel into another.",
    ),
    (
        "Why is the sea salty and the river is not?",
        "Rivers carry tiny amounts of salt from the rocks down to the sea. The water leaves the sea again as vapour "
        "and the salt stays behind, so over a very long time it has added up.",
    ),
    (
        "Could you suggest a game for a long train journey?",
        "Try a story in turns. One person says the first sentence, the next person adds another, and nobody may use "
        "the same word to begin twice. It needs no paper and it gets silly very quickly.",
    ),
    (
        "What makes bread rise in the oven?",
        "Yeast eats sugar in the dough and gives off gas. The gas is caught in small bubbles, the heat makes the "
        "bubbles larger, and at last the crust sets and holds the shape.",
    ),
    (
        "How can I learn the names of my new neighbours?",
        "Say the name aloud when you hear it, use it once more before you part, and write it down when you are home. "
        "A little drawing of the house with names in it helps a lot.",
    ),
    (
        "Why do leaves turn red and yellow in autumn?",
        "The green colour is taken apart before the leaf falls, because the tree wants to save what is in it. The "
        "yellow was there all the time, and the red is made at the very end.",
    ),
    (
        "Is it better to read on paper or on a screen?",
        "Paper is easier to browse and easier to remember by place, and a screen is lighter and can be searched. For "
        "a long book at home many people still choose paper.",
    ),
    (
        "What is a lighthouse keeper's work like today?",
        "Most lighthouses run by themselves now. Someone visits a few times a year to clean the lenses, to test the "
        "lamp and its spare, and to paint whatever the storms have damaged.",
    ),
    (
        "How should I water a cactus?",
        "Give it a good soak and then wait until the soil is dry all the way down. In summer that may be every two "
        "weeks, and in winter once in two months is often enough.",
    ),
    (
        "Why do we yawn when somebody else yawns?",
        "Nobody is quite sure. One idea is that it keeps a group in the same rhythm of rest and waking, and it is "
        "true that we catch a yawn more easily from people we know well.",
    ),
    (
        "How do I write a thank you letter that is not boring?",
        "Name the one thing that you liked most and tell what you did with it. Two honest sentences about that are "
        "worth more than a page of polite words that would fit any present.",
    ),
    (
        "What does an orchestra conductor actually do?",
        "Most of the work happens before the concert. The conductor decides how fast and how loud each passage should "
        "be, hears what is out of balance, and then reminds everyone of it with the hands.",
    ),
    (
        "How do birds find their way when they fly south?",
        "They use several maps at once. They look at the sun and the stars, they feel the direction of the magnetic "
        "field, and older birds know the rivers and coasts along the way.",
    ),
    (
        "Why does my old radio crackle before a storm?",
        "Every flash of lightning sends out a short burst of radio waves. A simple receiver hears that burst as a "
        "crackle, even when the storm is still too far away to be seen.",
    ),
    (
        "What is the easiest way to clean a window without streaks?",
        "Use warm water with very little soap, wash from the top to the bottom, and pull it dry with a rubber blade. "
        "Do it on a cloudy day, because sunshine dries the water too fast.",
    ),
    (
        "How tall can a tree grow?",
        "The tallest ones that we know are a little over one hundred metres. Higher than that, it becomes too hard to "
        "lift water from the roots up to the leaves at the top.",
    ),
    (
        "What is a good habit for someone who starts running?",
        "Go slowly enough that you can talk while you run, and stop while it still feels easy. Three short runs in a "
        "week will do more for you than one long run on Sunday.",
    ),
    (
        "Why do some bridges have gaps in the road?",
        "Steel and concrete grow a little in the heat and shrink in the cold. The gaps let the bridge move without "
        "breaking, and the metal fingers over them keep the wheels from falling in.",
    ),
    (
        "Can you tell me how paper is recycled?",
        "Old paper is stirred in water until it falls apart into fibres. Ink and staples are taken out, the clean pulp "
        "is spread over a fine net, and the sheet is pressed and dried.",
    ),
    (
        "How do you choose a seat in the cinema?",
        "Sit about two thirds of the way back and near the middle. The sound is mixed for that place, and the picture "
        "fills your view without making you turn your head.",
    ),
    (
        "What was the first thing that people sent by telegraph?",
        "Railways used it early on, to say that a train had left and the line was busy. News and prices came soon "
        "after, and greetings to relatives only when it became cheap.",
    ),
    (
        "Why does hot soup cool down faster when I blow on it?",
        "Above the soup there is a layer of warm, damp air. When you blow it away, more water can leave the surface, "
        "and each bit of water that leaves takes some heat with it.",
    ),
)
