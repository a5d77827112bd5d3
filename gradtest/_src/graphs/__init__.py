"""Pictures of programs: jaxprs, gradients and HLO as Graphviz graphs."""

from gradtest._src.graphs.graphing import Graph as Graph
from gradtest._src.graphs.graphing import graph as graph
from gradtest._src.graphs.rendering import GraphvizError as GraphvizError
