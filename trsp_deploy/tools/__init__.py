"""Parts that stages share, one package per concern; gates, plans and the library of named files stand beside them."""
