"""One attention on several ranks: the exchange, and the strategies on it. Knows no model; exact unless it says so."""
