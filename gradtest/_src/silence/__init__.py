"""Why a leaf has no gradient: where on its way back from the loss it ends."""
