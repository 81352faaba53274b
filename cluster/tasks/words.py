"""Word lists of the recall and small-talk tasks: common words, so that the small tokenizer holds most as one token."""

COLOURS = ("amber", "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "silver", "violet",
           "white", "yellow", "golden", "wooden", "small", "large", "old", "round")  # fmt: skip
THINGS = ("anchor", "basket", "bell", "bottle", "box", "bridge", "button", "candle", "chair", "clock", "coat", "door",
          "drum", "engine", "gate", "hammer", "key", "kite", "lamp", "lantern", "ladder", "mirror", "needle", "paper",
          "pencil", "piano", "ring", "rocket", "room", "ship", "table", "tower", "train", "window")  # fmt: skip
ATTRIBUTES = ("code", "number", "password")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "fish", "fox", "horse", "mouse", "owl", "rabbit", "sheep")
PEOPLE = ("baker", "doctor", "farmer", "teacher", "painter", "sailor", "singer", "writer", "student", "driver",
          "gardener", "cook")  # fmt: skip
PLACES = ("beach", "city", "field", "forest", "garden", "harbour", "hill", "house", "island", "lake", "market",
          "mountain", "park", "river", "road", "school", "station", "village")  # fmt: skip
QUALITIES = ("big", "calm", "clever", "cold", "dark", "happy", "kind", "lazy", "quiet", "quick", "slow", "strong",
             "tired", "warm", "wild", "young")  # fmt: skip
PAST_ACTIONS = ("walked to", "looked at", "ran past", "slept near", "waited at", "came back from", "stopped at",
                "went around", "sang near", "talked about", "thought about", "remembered")  # fmt: skip
TIMES = ("in the morning", "in the evening", "at night", "last summer", "after lunch", "before the rain",
         "on Sunday", "every day", "in winter", "for an hour", "once a week", "yesterday")  # fmt: skip
WEATHER = ("rain", "snow", "wind", "sun", "fog", "storm")
FOODS = ("bread", "cheese", "soup", "rice", "cake", "fruit", "honey", "tea", "milk", "salad")
OWNERS = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria",
          "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Alice", "Bob", "John", "Mary", "Peter")  # fmt: skip
FREE_ATTRIBUTES = ("name", "number", "code", "password", "city", "age", "colour", "secret word", "phone number",
                   "address", "dog", "cat", "favourite food", "favourite colour", "room",
          "birthday", "country", "job", "key",
                   "team", "street", "secret", "token", "pin")  # fmt: skip
VALUES = ("Rome", "Paris", "Berlin", "London", "banana", "apple", "dragon", "red", "blue", "green", "Rex", "Bella",
          "Luna", "Max", "pizza", "rice", "soup", "tiger", "Monday", "May", "winter", "Tokyo", "Madrid", "purple",
          "orange", "Miller", "Smith", "tennis", "chess", "teacher", "doctor", "sunflower",
          "rocket", "window", "piano")  # fmt: skip
