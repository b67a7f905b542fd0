"""A synthetic world in the formats of the real data sets, and two small pretrained towers that know it."""
