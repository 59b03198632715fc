"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const EDGES = [0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 2, 3, 3, 4, 4, 1];
  const canvas = at("canvas"), stage = at("stage");

  THREE.ColorManagement.enabled = false; // colours are shown as the pictures have them
  let renderer;
  try {
    renderer = new THREE.WebGLRenderer({ canvas, antialias: true });
    renderer.outputColorSpace = "srgb-linear";
  } catch (error) {
    canvas.hidden = true;
    const words = document.createElement("p");
    words.className = "say";
    words.textContent = "This browser has no WebGL, which draws the scene. The pictures below need none.";
    stage.prepend(words);
  }

  const photo = new THREE.BufferAttribute(bytes(data.colours), 3, true);
  const difference = data.difference && new THREE.BufferAttribute(bytes(data.difference), 3, true);
  const material = new THREE.PointsMaterial({ vertexColors: true, sizeAttenuation: true });
  const lines = new THREE.LineBasicMaterial({ vertexColors: true });
  const now = new THREE.LineBasicMaterial({ color: 0xffffff });

  const views = data.views.map((view) => {
    const scene = new THREE.Scene();
    scene.background = new THREE.Color(0x1d2025);
    const cloud = new THREE.BufferGeometry();
    cloud.setAttribute("position", new THREE.BufferAttribute(floats(view.points), 3));
    cloud.setAttribute("color", photo);
    const corners = floats(view.cameras);
    const count = corners.length / 15;
    const places = new Float32Array(count * EDGES.length * 3);
    const shades = new Float32Array(places.length);
    const first = new THREE.Color(0x3b7be0), last = new THREE.Color(0xf0781e), shade = new THREE.Color();
    for (let camera = 0; camera < count; camera++) {
      shade.lerpColors(first, last, count > 1 ? camera / (count - 1) : 0);
      EDGES.forEach((corner, place) => {
        const from = (camera * 5 + corner) * 3, to = (camera * EDGES.length + place) * 3;
        places.set(corners.subarray(from, from + 3), to);
        shades.set([shade.r, shade.g, shade.b], to);
      });
    }
    const frusta = new THREE.BufferGeometry();
    frusta.setAttribute("position", new THREE.BufferAttribute(places, 3));
    frusta.setAttribute("color", new THREE.BufferAttribute(shades, 3));
    const one = new THREE.BufferGeometry();
    one.setAttribute("position", frusta.getAttribute("position"));
    const cameras = new THREE.LineSegments(frusta, lines), current = new THREE.LineSegments(one, now);
    const points = new THREE.Points(cloud, material);
    for (const each of [points, cameras, current]) {
      each.frustumCulled = false;
      scene.add(each);
    }
    return { scene, cloud, corners, cameras, current, one };
  });

  const camera = new THREE.PerspectiveCamera(55, 1, data.size / 1000, data.size * 100);
  const corner = (number, which) =>
    new THREE.Vector3().fromArray(views[0].corners, (number * 5 + which) * 3);
  const pose = (number) => {
    const centre = corner(number, 0);
    const top = corner(number, 1).add(corner(number, 2)).multiplyScalar(0.5).sub(centre);
    const bottom = corner(number, 3).add(corner(number, 4)).multiplyScalar(0.5).sub(centre);
    const ahead = top.clone().add(bottom).normalize();
    return { centre, ahead, up: top.clone().sub(bottom).normalize(), angle: top.angleTo(bottom) };
  };
  const frames = data.names.length;
  const up = new THREE.Vector3();
  for (let number = 0; number < frames; number++) up.add(pose(number).up);
  if (up.length() < 1e-6) up.set(0, -1, 0);
  camera.up.copy(up.normalize());
  const controls = new THREE.OrbitControls(camera, canvas);
  const middle = new THREE.Vector3().fromArray(data.middle);

  let asked = false;
  const draw = () => {
    if (!renderer || asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      const width = stage.clientWidth, height = stage.clientHeight, part = width / views.length;
      renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
      renderer.setSize(width, height, false);
      renderer.setScissorTest(true);
      camera.aspect = part / height;
      camera.updateProjectionMatrix();
      views.forEach((view, place) => {
        renderer.setViewport(place * part, 0, part, height);
        renderer.setScissor(place * part, 0, part, height);
        renderer.render(view.scene, camera);
      });
      document.body.dataset.drawn = Number(document.body.dataset.drawn || 0) + 1;
    });
  };

  const overview = () => {
    const start = pose(0);
    const back = start.ahead.clone().multiplyScalar(-0.55).addScaledVector(up, 0.35);
    camera.fov = 55;
    camera.position.copy(middle).addScaledVector(back.normalize(), data.size * 1.1);
    controls.target.copy(middle);
    controls.update();
    draw();
  };
  const through = () => {
    const { centre, ahead, angle } = pose(Number(at("frame").value));
    camera.fov = Math.min(120, Math.max(10, (angle * 180) / Math.PI));
    camera.position.copy(centre);
    controls.target.copy(centre).addScaledVector(ahead, data.size * 0.5);
    controls.update();
    draw();
  };
  const show = () => {
    const number = Number(at("frame").value);
    const coloured = difference && at("difference").checked;
    for (const view of views) {
      view.cloud.setAttribute("color", coloured ? difference : photo);
      view.cloud.setDrawRange(0, at("until").checked ? data.ends[number] : data.ends[frames - 1]);
      view.cameras.visible = view.current.visible = at("cameras").checked;
      view.one.setDrawRange(number * EDGES.length, EDGES.length);
    }
    material.size = (data.size / 220) * Number(at("size").value);
    at("legend").hidden = !coloured;
    at("label").textContent = `${number + 1} of ${frames}`;
    const known = Object.keys(data.pictures).map(Number);
    const nearest = known.reduce((best, each) =>
      Math.abs(each - number) < Math.abs(best - number) ? each : best);
    at("image").src = `data:image/jpeg;base64,${data.pictures[nearest]}`;
    const kinds = difference ? "frame, dense depth, reduced depth" : "frame, depth";
    at("caption").textContent = `${data.names[nearest]}: ${kinds}`;
    draw();
  };

  if (difference) {
    at("different").hidden = at("bar").hidden = false;
    at("scale").textContent = data.scale;
    data.views.forEach((view, place) => {
      const name = document.createElement("div");
      name.className = "name";
      name.style.left = `calc(${(100 * place) / views.length}% + .8rem)`;
      name.textContent = view.name;
      stage.append(name);
    });
  }
  at("frame").max = frames - 1;
  for (const id of ["frame", "until", "cameras", "difference", "size"])
    at(id).addEventListener("input", show);
  at("through").addEventListener("click", through);
  at("overview").addEventListener("click", overview);
  controls.addEventListener("change", draw);
  new ResizeObserver(draw).observe(stage);
  show();
  overview();
})();
