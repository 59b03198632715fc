// What the page needs of three.js. three.min.js is made from this file, as three.README says.
export {
  BufferAttribute, BufferGeometry, Color, ColorManagement, LineBasicMaterial, LineSegments,
  PerspectiveCamera, Points, PointsMaterial, Scene, Vector3, WebGLRenderer,
} from "three";
export { OrbitControls } from "three/examples/jsm/controls/OrbitControls.js";
