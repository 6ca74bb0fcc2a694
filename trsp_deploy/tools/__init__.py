"""Parts that stages share, a package a concern; gates, plans and the library of named files stand beside them."""
