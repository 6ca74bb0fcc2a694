"""Parts that stages share: gates, plans, texts, models, runners, named recipes and engine specs."""
